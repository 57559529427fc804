"""vLLM's scheduler, routed or stock, step by step, with a model that always answers the same."""

from collections import Counter, deque

import torch
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.structured_output import StructuredOutputManager

from vllm_reroute.plan import decided_turn
from vllm_reroute.schedule import RoutingSchedule, is_routed

from .parts import feature, kv_cache_config, make_request
from .slow_worker import ANSWER, SlowWorker

BLOCK = 16
DEPTH = 8
PAGES = 2
OPTIONS = {"layers": [3, 5], "keep": [0.5, 0.25]}


class Steps:
    """A scheduler and the worker that follows it.

    units: blocks of tokens in every layer that the pool holds beside its null block; a routed pool
    has as many for parked states. encoder_cache: visual tokens that its cache holds.
    """

    def __init__(
        self,
        vllm_config,
        *,
        units=100,
        caching=True,
        asynchronous=False,
        block_size=BLOCK,
        encoder_cache=None,
        parked_units=0,
    ):
        self.worker, self.block_size = None, block_size
        if is_routed(vllm_config):
            # One block of a routed pool is one layer's; a stock one has all layers.
            num_blocks = DEPTH * units + PAGES * parked_units + 1
            schedule = RoutingSchedule.of(vllm_config)
            kv = kv_cache_config(schedule, num_blocks, block_size=block_size, parked_pages=PAGES)
            self.worker = SlowWorker(kv, schedule, block_size, offers_parked=caching)
        else:
            num_blocks = units + 1
            spec = FullAttentionSpec(
                block_size=block_size, num_kv_heads=1, head_size=32, dtype=torch.bfloat16
            )
            kv = KVCacheConfig(
                num_blocks, [], [KVCacheGroupSpec([f"layers.{i}.attn" for i in range(DEPTH)], spec)]
            )
        vllm_config.cache_config.num_gpu_blocks = num_blocks
        vllm_config.cache_config.enable_prefix_caching = caching
        vllm_config.scheduler_config.async_scheduling = asynchronous
        self.scheduler = vllm_config.scheduler_config.get_scheduler_cls()(
            vllm_config=vllm_config,
            kv_cache_config=kv,
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=block_size,
            hash_block_size=block_size,
            log_stats=True,
        )
        if encoder_cache is not None:
            self.scheduler.encoder_cache_manager = EncoderCacheManager(encoder_cache)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.capacity = self.pool.get_num_free_blocks()
        self.in_flight = deque()
        self.progress, self.created = {}, {}

    def add(self, *requests):
        for request in requests:
            self.scheduler.add_request(request)

    def run(self):
        """One step and its answer: request id -> tokens scheduled, in batch order."""
        scheduled = self.schedule()
        while self.in_flight:
            self.answer()
        return scheduled

    def schedule(self):
        """One step whose answer is awaited: request id -> tokens scheduled, in batch order."""
        output = self.scheduler.schedule()
        requests = self.scheduler.requests
        sampled = {
            name: [] if requests[name].is_prefill_chunk else [ANSWER]
            for name in output.num_scheduled_tokens
        }
        self.plan = self.worker and self.worker.execute(output, requests)
        self.in_flight.append((output, sampled))
        self.check()
        return dict(output.num_scheduled_tokens)

    def answer(self, decided=None):
        """Hand the oldest step's tokens to the scheduler, and what it has decided, by request id."""
        output, sampled = self.in_flight.popleft()
        places = {name: i for i, name in enumerate(sampled)}
        runner_output = ModelRunnerOutput([*sampled], places, [*sampled.values()])
        decided_turn.send(runner_output, decided or {})
        outputs = self.scheduler.update_from_output(output, runner_output)
        for of_client in outputs.values():
            for one in of_client.outputs:
                if one.prefill_stats is not None:
                    self.created[one.request_id] = one.prefill_stats.num_cache_creation_tokens
        return outputs

    def check(self):
        """What must be true after any step."""
        if self.worker:
            self.check_books()
        self.check_waiting()
        self.check_progress()

    def check_books(self):
        """No block is held twice by a request, lost, or for two kinds of data."""
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        users, tags = Counter(), {}
        for manager in managers:
            for name, blocks in manager.req_to_blocks.items():
                assert not blocks or name in self.scheduler.requests
                held = [block for block in blocks if not block.is_null]
                assert len({block.block_id for block in held}) == len(held)
                for entry, block in enumerate(blocks):
                    if not block.is_null:
                        users[block.block_id] += 1
                        tag = manager.kv_cache_group_id, entry
                        assert tags.setdefault(block.block_id, tag) == tag
        for block in self.pool.blocks:
            assert block.is_null or block.ref_cnt == users[block.block_id]
        assert self.pool.get_num_free_blocks() == self.capacity - len(users)
        for name in self.scheduler.parked_pages.holders:
            request = self.scheduler.requests[name]
            assert request.num_computed_tokens < request.num_prompt_tokens

    def check_waiting(self):
        """Who waits holds nothing that another may need: no block, no place in the encoder cache."""
        coordinator = self.scheduler.kv_cache_manager.coordinator
        encoder_cache = self.scheduler.encoder_cache_manager
        for request in self.scheduler.waiting:
            assert not any(coordinator.get_blocks(request.request_id))
            assert not encoder_cache.get_cached_input_ids(request)

    def check_progress(self):
        """It never goes back but by a preemption."""
        for name, request in self.scheduler.requests.items():
            preempted, computed = self.progress.get(name, (0, 0))
            assert (request.num_preemptions, request.num_computed_tokens) >= (preempted, computed)
            self.progress[name] = request.num_preemptions, request.num_computed_tokens

    def finish(self, limit=2000):
        """Steps until nothing is left; all blocks must be back."""
        steps = []
        while self.scheduler.has_unfinished_requests():
            steps.append(self.run())
            assert len(steps) < limit, "requests wait for ever"
        assert self.pool.get_num_free_blocks() == self.capacity
        return steps


def text(name, num_tokens, first=0, **options):
    return make_request(name, list(range(first, first + num_tokens)), **options)


def image(name, num_tokens, at=(5,), length=16, **options):
    """A prompt with pictures of its own at these places."""
    images = [feature(offset, length, name=f"{name}-{offset}") for offset in at]
    return make_request(name, num_tokens, images, **options)
