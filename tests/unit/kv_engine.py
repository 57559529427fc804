"""vLLM's K/V cache manager with routing, driven one request at a time, and prompts made of parts."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from vllm_reroute.kv_cache.kept_turns import KeptTurns
from vllm_reroute.kv_cache.live_routing import LiveRouting
from vllm_reroute.kv_cache.parked_manager import ParkedManager
from vllm_reroute.kv_cache.prefix_hits import PrefixHits
from vllm_reroute.kv_cache.stage_manager import StageManager
from vllm_reroute.schedule import RerouteOptions

from .parts import feature, kv_cache_config, make_request

BLOCK = 16
# 8 layers: 3 dense, then 2 and 3 with half and a quarter of the visual tokens. Three stages.
SCHEDULE = RerouteOptions(layers=(3, 5), keep=(0.5, 0.25)).resolve(8)
DEPTH = SCHEDULE.num_layers
PAGES = 2
"""Pages of parked states per block of tokens."""


class Engine:
    """What the scheduler does with a `KVCacheManager`, one request at a time.

    step: tokens that a step may hold.
    """

    def __init__(self, schedule=SCHEDULE, num_blocks=2000, caching=True, step=4096):
        self.manager = KVCacheManager(
            kv_cache_config(schedule, num_blocks, block_size=BLOCK, parked_pages=PAGES),
            max_model_len=4096,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
            enable_caching=caching,
        )
        self.pool = self.manager.block_pool
        self.schedule, self.requests = schedule, {}
        self.live = LiveRouting(
            self.requests, schedule, block_size=BLOCK, offers_parked=caching, max_step_tokens=step
        )
        managers = self.manager.coordinator.single_type_managers
        for manager in managers:
            manager.live = self.live
        self.stages = [manager for manager in managers if isinstance(manager, StageManager)]
        (self.parked,) = (manager for manager in managers if isinstance(manager, ParkedManager))
        self.kept = KeptTurns(self.manager, self.live)
        hits = PrefixHits(self.manager, self.live, self.kept)
        self.manager.get_computed_blocks = hits.get_computed_blocks
        self.manager.estimate_cached_tokens = hits.num_offered

    def hit(self, request: Request) -> int:
        """Tokens of the request that are in the prefix cache."""
        self.requests[request.request_id] = request
        _, num_hit, _ = self.manager.get_computed_blocks(request)
        del self.requests[request.request_id]
        return num_hit

    def prefill(self, request, num_tokens=None, *, offers=False):
        """Admit a request and run its first step, of `num_tokens` or all of it.

        Block ids per group, and tokens found in the prefix cache; None if it does not fit.
        """
        self.requests[request.request_id] = request
        hits, num_hit, _ = self.manager.get_computed_blocks(request)
        new = (num_tokens or request.num_tokens) - num_hit
        if self._allocate(request, new, num_hit, hits, full_sequence_must_fit=True) is None:
            return None
        self._ran(request, num_hit + new, offers)
        return self.manager.get_block_ids(request.request_id), num_hit

    def turns(self, request):
        """Admit a request that keeps its turns, and run it as the scheduler does, a turn a step."""
        self.requests[request.request_id] = request
        routing = self.live.of(request)
        _, num_hit, _ = self.manager.get_computed_blocks(request)
        end = routing.turns.next_end(num_hit) or request.num_tokens
        self.prefill(request, end, offers=True)
        while request.num_computed_tokens < request.num_tokens:
            end = routing.turns.next_end(request.num_computed_tokens) or request.num_tokens
            self.run(request, end - request.num_computed_tokens, offers=True)

    def run(self, request, num_tokens, *, offers=False):
        """New block ids per group for more tokens of the prompt; None if there is no room."""
        empty = self.manager.empty_kv_cache_blocks
        new = self._allocate(request, num_tokens, 0, empty)
        if new is None:
            return None
        self._ran(request, request.num_computed_tokens + num_tokens, offers)
        return new.get_block_ids()

    def decode(self, request):
        """New block ids per group for one more token."""
        request.append_output_token_ids(7)
        return self.run(request, 1)

    def _allocate(self, request, new, num_hit, hits, **options):
        """What is asked of the pool before is what is taken from it, found blocks included."""
        before = request.num_computed_tokens + num_hit
        asked = self.manager.coordinator.get_num_blocks_to_allocate(
            request.request_id, before + new, hits.blocks, 0, before, before, before + new
        )
        free = self.pool.get_num_free_blocks()
        blocks = self.manager.allocate_slots(request, new, num_hit, hits, **options)
        assert free - self.pool.get_num_free_blocks() == (0 if blocks is None else asked)
        return blocks

    def _ran(self, request, num_computed, offers):
        request.num_computed_tokens = num_computed
        if offers:
            self.kept.offer(request)
        self.parked.release_decided()

    def finish(self, request):
        if self.schedule.marker:
            self.kept.ended(request)
        self.manager.free(request)
        del self.requests[request.request_id]

    def preempt(self, request):
        self.manager.free(request)
        request.num_computed_tokens = 0

    def held(self, request):
        """Blocks per stage."""
        ids = self.manager.get_block_ids(request.request_id)
        return [len(ids[stage.kv_cache_group_id]) for stage in self.stages]

    def pages(self, request):
        """Pages of parked states, without the null block's entries."""
        blocks = self.parked.req_to_blocks.get(request.request_id, ())
        return sum(not block.is_null for block in blocks)

    def expected_held(self, request):
        """Blocks per stage, from the one function that scheduler and worker share."""
        routing, computed = self.live.of(request), request.num_computed_tokens
        return [
            stage.num_layers
            * cdiv(routing.kv_length(number, computed) if routing else computed, BLOCK)
            for number, stage in enumerate(self.schedule.stages)
        ]

    def expected_pages(self, request):
        """Pages of what waits for the request's decisions, in whole blocks."""
        routing, computed = self.live.of(request), request.num_computed_tokens
        if routing is None or not routing.text_prefix < computed < routing.num_prompt:
            return 0
        return PAGES * (cdiv(computed, BLOCK) - routing.text_prefix // BLOCK)


@dataclass(frozen=True)
class Text:
    """Tokens that are the same wherever the label is."""

    label: str
    length: int

    def tokens(self):
        first = 1000 + 1000 * (sum(map(ord, self.label)) % 97)
        return [*range(first, first + self.length)]


@dataclass(frozen=True)
class Picture:
    """An image of that many visual tokens, known by its name."""

    name: str
    length: int = 40
    modality: str = "image"


def ask(name: str, *parts: Text | Picture, output: Sequence[int] = (), **fields) -> Request:
    """A request whose prompt is made of parts. output: tokens it has generated so far."""
    tokens, images = [], []
    for part in parts:
        if isinstance(part, Text):
            tokens += part.tokens()
        else:
            images.append(feature(len(tokens), part.length, modality=part.modality, name=part.name))
            tokens += [0] * part.length
    request = make_request(name, tokens, images, block_size=BLOCK, **fields)
    if output:
        request.append_output_token_ids(list(output))
    return request


def text(name, num_tokens, first=0):
    return make_request(name, list(range(first, first + num_tokens)), block_size=BLOCK)


def with_image(name, num_tokens=90, image=None):
    """90 tokens with an image of 40, which keeps 40, 20 and 10, behind 40 of text."""
    return make_request(name, num_tokens, [image or feature(40, 40)], block_size=BLOCK)
