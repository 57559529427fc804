"""Step tables of vLLM's scheduler with routing: what runs in which step, and with which blocks."""

import random

import numpy as np
import pytest
import torch
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_reroute.kv_cache.scheduler import RoutedAsyncScheduler, RoutedScheduler
from vllm_reroute.plan.step_plan import RequestRouting, plan_step
from vllm_reroute.plan.visual_spans import visual_spans
from vllm_reroute.schedule import CONFIG_KEY, RoutingSchedule

from .parts import VISUAL, feature, kv_cache_config, make_request

BLOCK = 16
BUDGET = 64
DEPTH = 8
OPTIONS = {"layers": [3, 5], "keep": [0.5, 0.25]}


@pytest.fixture(scope="module")
def configs(engine_config):
    """vLLM's config with and without routing; steps of `BUDGET` tokens."""
    common = {"max_num_batched_tokens": BUDGET, "max_model_len": 512, "enable_prefix_caching": True}
    return {
        "routed": engine_config(**common, additional_config={CONFIG_KEY: OPTIONS}),
        "stock": engine_config(**common),
    }


class Steps:
    """A scheduler, and a model that always answers `7`."""

    def __init__(self, vllm_config, *, units=100, caching=True, asynchronous=False):
        """units: blocks of 16 tokens in every layer that the pool holds beside its null block."""
        if CONFIG_KEY in vllm_config.additional_config:
            # One block of a routed pool is one layer's; a stock one has all layers.
            num_blocks, self.schedule = DEPTH * units + 1, RoutingSchedule.of(vllm_config)
            kv = kv_cache_config(self.schedule, num_blocks, block_size=BLOCK)
        else:
            num_blocks = units + 1
            spec = FullAttentionSpec(
                block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.bfloat16
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
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=True,
        )
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.capacity = self.pool.get_num_free_blocks()

    def add(self, *requests):
        for request in requests:
            self.scheduler.add_request(request)

    def run(self):
        """One step: request id -> tokens scheduled, in batch order."""
        output = self.scheduler.schedule()
        scheduled = dict(output.num_scheduled_tokens)
        self.check(scheduled)
        self.answer(output)
        return scheduled

    def answer(self, output):
        ids = list(output.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in ids]
        sampled = [[] if r.is_prefill_chunk else [7] for r in requests]
        places = {name: i for i, name in enumerate(ids)}
        self.scheduler.update_from_output(output, ModelRunnerOutput(ids, places, sampled))

    def check(self, scheduled):
        """Whatever is scheduled: the worker can plan it, and has a block for every slot it writes."""
        if not isinstance(self.scheduler, RoutedScheduler | RoutedAsyncScheduler):
            return
        requests = [self.scheduler.requests[name] for name in scheduled]
        now = np.array([scheduled[r.request_id] for r in requests], dtype=np.int64)
        before = np.array([r.num_computed_tokens for r in requests], dtype=np.int64) - now
        ratios = self.schedule.ratios
        routings = [
            RequestRouting.of(visual_spans(r), r.prompt_token_ids, ratios) for r in requests
        ]
        plan = plan_step(before, now, routings, ratios)
        for i, request in enumerate(requests):
            blocks = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)
            for ratio, of_group in zip(ratios, blocks, strict=True):
                slots = len(of_group) // len(self.schedule.layers_with(ratio)) * BLOCK
                assert plan.lengths[ratio].seq_lens[i] <= slots

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


def image(name, num_tokens, at=(5,), **options):
    images = [feature(offset, VISUAL, name=f"{name}-{offset}") for offset in at]
    return make_request(name, num_tokens, images, **options)


# Requests in order of arrival -> what runs in the first steps, of 64 tokens each.
TABLE = {
    "an image that fits": ([image("i", 40)], [{"i": 40}, {"i": 1}]),
    "an image that fits exactly": ([image("i", BUDGET)], [{"i": BUDGET}, {"i": 1}]),
    "text is cut": ([text("t", 150)], [{"t": 64}, {"t": 64}, {"t": 22}, {"t": 1}]),
    "an image waits whole for what a text chunk leaves": (
        [text("t", 100), image("i", 40)],
        [{"t": 64}, {"t": 36}, {"t": 1, "i": 40}, {"t": 1, "i": 1}],
    ),
    "an image takes what a text chunk leaves": (
        [text("t", 84), image("i", 40)],
        [{"t": 64}, {"t": 20, "i": 40}, {"t": 1, "i": 1}],
    ),
    "text fills up what an image leaves": (
        [image("i", 40), text("t", 100)],
        [{"i": 40, "t": 24}, {"i": 1, "t": 63}, {"i": 1, "t": 13}, {"i": 1, "t": 1}],
    ),
    "two images in a step": (
        [image("i", 30), image("j", 34), image("k", 24)],
        [{"i": 30, "j": 34}, {"i": 1, "j": 1, "k": 24}, {"i": 1, "j": 1, "k": 1}],
    ),
    "a second image that does not fit": (
        [image("i", 30), image("j", 35)],
        [{"i": 30}, {"i": 1, "j": 35}, {"i": 1, "j": 1}],
    ),
    "an image of the whole budget waits for running requests": (
        [text("t", 10, max_tokens=2), image("i", BUDGET)],
        [{"t": 10}, {"t": 1}, {"i": BUDGET}, {"i": 1}],
    ),
    "a waiting image keeps its turn": (
        [text("t", 100), image("i", 40), text("late", 10, first=500)],
        [{"t": 64}, {"t": 36}, {"t": 1, "i": 40, "late": 10}],
    ),
    "several images in a prompt are one piece": (
        [text("t", 20), image("i", 60, at=(0, 20, 40))],
        [{"t": 20}, {"t": 1, "i": 60}],
    ),
    "text far behind the image belongs to the piece": (
        [text("t", 30), image("i", 60, at=(0,))],
        [{"t": 30}, {"t": 1, "i": 60}],
    ),
    "text far before the image belongs to the piece": (
        [text("t", 30), image("i", 60, at=(43,))],
        [{"t": 30}, {"t": 1, "i": 60}],
    ),
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("requests,expect", TABLE.values(), ids=TABLE)
def test_steps(configs, requests, expect, asynchronous):
    steps = Steps(configs["routed"], asynchronous=asynchronous)
    fresh = [
        make_request(r.request_id, r.prompt_token_ids, r.mm_features, max_tokens=r.max_tokens)
        for r in requests
    ]
    steps.add(*fresh)
    assert [steps.run() for _ in expect] == expect
    steps.finish()


@pytest.mark.parametrize(
    "asynchronous,expect", [(False, RoutedScheduler), (True, RoutedAsyncScheduler)]
)
def test_the_scheduler_fits_the_engine(configs, asynchronous, expect):
    scheduler = Steps(configs["routed"], asynchronous=asynchronous).scheduler
    assert type(scheduler) is expect and isinstance(
        scheduler, AsyncScheduler if asynchronous else Scheduler
    )
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    assert len(managers) == 3 and all(
        manager.requests is scheduler.requests for manager in managers
    )


def test_an_image_runs_a_step_behind_with_asynchronous_scheduling(configs):
    """The next step is scheduled before the answer to the last one is known."""
    steps = Steps(configs["routed"], asynchronous=True)
    steps.add(text("t", 90), image("i", 40))
    outputs = [steps.scheduler.schedule()]
    seen = [dict(outputs[0].num_scheduled_tokens)]
    for _ in range(4):
        outputs.append(steps.scheduler.schedule())
        seen.append(dict(outputs[-1].num_scheduled_tokens))
        steps.check(seen[-1])
        steps.answer(outputs.pop(0))
    assert seen == [{"t": 64}, {"t": 26}, {"t": 1, "i": 40}, {"t": 1, "i": 1}, {"t": 1, "i": 1}]


def test_only_image_requests_skip_the_prefix_cache(configs):
    steps = Steps(configs["routed"])
    steps.add(text("t", 40))
    assert steps.run() == {"t": 40}
    steps.add(text("t again", 40), image("i", 53, at=(35,)))
    requests = steps.scheduler.requests
    assert [requests[name].skip_reading_prefix_cache for name in requests] == [False, False, True]
    assert steps.run() == {"t": 1, "t again": 8, "i": 53}, (
        "32 tokens of `t again` were found, none of `i`"
    )
    steps.finish()


def test_the_same_image_twice_is_whole_twice(configs):
    """The second request finds its image in the encoder cache, which must not change the rule."""
    shared = feature(5, VISUAL, name="shared")
    steps = Steps(configs["routed"])
    steps.add(make_request("a", 40, [shared]))
    steps.run()
    steps.add(text("t", 30), make_request("b", 40, [shared]))
    assert [steps.run() for _ in range(2)] == [{"a": 1, "t": 30}, {"a": 1, "t": 1, "b": 40}]
    steps.finish()


def test_a_waiting_image_holds_nothing_in_the_encoder_cache(configs):
    shared = feature(5, VISUAL, name="shared")
    steps = Steps(configs["routed"])
    steps.add(make_request("a", 40, [shared], max_tokens=1))
    steps.run()
    steps.add(text("t", 50), make_request("b", 40, [shared]))
    assert steps.run() == {"t": 50}
    assert not steps.scheduler.encoder_cache_manager.cached["shared"]
    assert steps.run() == {"t": 1, "b": 40}
    steps.finish()


def test_an_image_waits_whole_for_the_vision_encoder(configs):
    """vLLM would run the text before an image that the encoder has no room for."""
    steps = Steps(configs["routed"])
    steps.scheduler.max_num_encoder_input_tokens = VISUAL
    steps.add(image("i", 30), image("j", 30))
    assert [steps.run() for _ in range(3)] == [{"i": 30}, {"i": 1, "j": 30}, {"i": 1, "j": 1}]
    steps.finish()


def test_a_preempted_image_request_comes_back_whole(configs):
    """Two image requests outgrow the pool; the later one is preempted and repeats its prompt."""
    steps = Steps(configs["routed"], units=6, caching=False)
    steps.add(image("a", 30, max_tokens=60), image("b", 30, max_tokens=60))
    b = steps.scheduler.requests["b"]
    prefills = []
    while steps.scheduler.has_unfinished_requests():
        num_tokens = b.num_tokens
        scheduled = steps.run().get("b", 0)
        if scheduled > 1:
            prefills.append((scheduled, num_tokens))
    assert prefills[0] == (30, 30) and len(prefills) == 1 + b.num_preemptions >= 2
    assert all(scheduled == num_tokens > 30 for scheduled, num_tokens in prefills[1:])


def test_a_resumed_request_longer_than_a_step_has_its_prompt_in_the_first(configs):
    steps = Steps(configs["routed"])
    steps.add(image("i", 50, max_tokens=100))
    for _ in range(31):
        steps.run()
    request = steps.scheduler.requests["i"]
    assert request.num_tokens == 81
    steps.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert request.status is RequestStatus.PREEMPTED
    steps.add(text("t", 20))
    assert [steps.run() for _ in range(3)] == [{"i": 64}, {"i": 17, "t": 20}, {"i": 1, "t": 1}]
    steps.finish()


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_abort_frees_every_block(configs, after):
    steps = Steps(configs["routed"])
    steps.add(image("i", 40), text("t", 100), image("j", 40))
    for _ in range(after):
        steps.run()
    steps.scheduler.finish_requests(["i", "t", "j"], RequestStatus.FINISHED_ABORTED)
    assert steps.pool.get_num_free_blocks() == steps.capacity
    assert not steps.scheduler.has_unfinished_requests()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_any_traffic_is_planned_and_ends(configs, seed, caching, asynchronous):
    """A small pool and random arrivals: chunks, preemptions, resumes. `Steps.check` runs in each step."""
    rng = random.Random(seed)
    steps = Steps(configs["routed"], units=14, caching=caching, asynchronous=asynchronous)
    arrivals = []
    for i in range(25):
        max_tokens = rng.randint(1, 70)
        if rng.random() < 0.6:
            num_images = rng.randint(1, 2)
            num_tokens = rng.randint(num_images * 20, BUDGET)
            at = range(0, num_images * 20, 20)
            arrivals.append(
                image(
                    f"i{i}",
                    num_tokens,
                    at=[p + rng.randint(0, 3) for p in at],
                    max_tokens=max_tokens,
                )
            )
        else:
            arrivals.append(text(f"t{i}", rng.randint(1, 120), max_tokens=max_tokens))
    for request in arrivals:
        steps.add(request)
        for _ in range(rng.randint(0, 12)):
            steps.run()
    steps.finish()
    assert all(request.num_output_tokens == request.max_tokens for request in arrivals)
    assert any(request.num_preemptions for request in arrivals), "the pool was meant to be short"


@pytest.mark.parametrize("units,caching", [(100, True), (100, False), (12, True), (12, False)])
@pytest.mark.parametrize("seed", range(4))
def test_text_is_scheduled_as_by_stock_vllm(configs, seed, units, caching):
    """Side by side on the same requests: same tokens in the same steps, same share of the pool."""
    rng = random.Random(seed)
    routed, stock = (
        Steps(configs[kind], units=units, caching=caching) for kind in ("routed", "stock")
    )
    requests = []
    for i in range(20):
        shared, own = rng.randint(0, 100), rng.randint(1, 50)
        prompt, max_tokens = [*range(shared), *[900 + i] * own], rng.randint(1, 40)
        for steps in (routed, stock):
            requests.append(make_request(f"r{i}", prompt, max_tokens=max_tokens))
            steps.add(requests[-1])
        for _ in range(rng.randint(0, 10)):
            assert routed.run() == stock.run()
            assert routed.pool.get_num_free_blocks() == DEPTH * stock.pool.get_num_free_blocks()
    assert routed.finish() == stock.finish()
    assert any(request.num_preemptions for request in requests) is (units == 12)


@pytest.mark.parametrize("kind", ["stock", "routed"])
def test_an_eviction_shortens_a_cached_prefix_as_in_stock_vllm(configs, kind):
    """Of 30 cached units, 3 are evicted for a request that needs 13 of 10 free ones."""
    steps = Steps(configs[kind], units=40)
    for name, num_tokens, first in (("conversation", 480, 0), ("in between", 200, 1000)):
        steps.add(text(name, num_tokens, first, max_tokens=1))
        steps.finish()
    _, num_hit, _ = steps.scheduler.kv_cache_manager.get_computed_blocks(text("next turn", 490))
    assert num_hit == 480 - 3 * BLOCK


def test_routed_requests_leave_room_for_more(configs):
    """As many image requests run at once as their routed blocks allow, more than a dense cache holds."""
    per_request = 3 * 3 + 2 * 2 + 3 * 2  # layers x blocks of 12 text and 32, 16 and 8 visual tokens
    dense = DEPTH * 3
    steps = Steps(configs["routed"], units=10)
    assert (steps.capacity // dense, steps.capacity // per_request) == (3, 4)
    steps.add(*(image(f"i{n}", 44, at=(0, 20), max_tokens=5) for n in range(8)))
    running = []
    while steps.scheduler.has_unfinished_requests():
        steps.run()
        running.append(len(steps.scheduler.running))
    assert max(running) == 4
