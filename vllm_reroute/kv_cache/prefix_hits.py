"""What of an image prompt is in the prefix cache."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from vllm_reroute.kv_cache.kept_turns import KeptTurns
from vllm_reroute.kv_cache.live_routing import LiveRouting
from vllm_reroute.kv_cache.parked_manager import ParkedManager
from vllm_reroute.kv_cache.stage_manager import StageManager
from vllm_reroute.plan.chunks import stops_alone
from vllm_reroute.plan.request_routing import RequestRouting


class PrefixHits:
    """Stands in for `KVCacheManager.get_computed_blocks`, whose coordinator never sees the request.

    The text prefix is a hit where every stage has it. Behind it only what does not depend on the
    question is cached: K/V of the stages before the first decision, and the states parked at its
    input. Both are needed to go on from there, and neither may be missing. So stages hold hits of
    two lengths. A turn's last tokens are never a hit: the step that runs them takes the decisions.

    Where a request keeps its turns, all of finished ones is cached, see `KeptTurns`, and this of the
    first one.
    """

    def __init__(self, manager: KVCacheManager, live: LiveRouting, kept: KeptTurns) -> None:
        self.manager = manager
        self.live, self.kept = live, kept
        managers = manager.coordinator.single_type_managers
        self._parked = next(m for m in managers if isinstance(m, ParkedManager))
        self._stages = [m for m in managers if isinstance(m, StageManager)]
        dense_stages = int(live.schedule.encoder_ratio is None)
        self._reusable = [self._parked, *(m for m in self._stages if m.stage < dense_stages)]
        self._stock = manager.get_computed_blocks

    def get_computed_blocks(self, request: Request, *limit: int | None) -> tuple[Any, int, int]:
        """As in vLLM: blocks per group, tokens they hold, and 0 (no sparse group lags behind).

        limit: most tokens of a hit, from vLLM 0.33 on. Image prompts that have one are not looked up.
        """
        routing = self.live.of(request)
        if routing is None or not self.manager.prefix_cache_lookup_enabled(request):
            return self._stock(request, *limit)
        if any(most is not None for most in limit):
            return self.manager.empty_kv_cache_blocks, 0, 0
        if routing.keeps_turns:
            blocks, hit = self.kept.find(request, routing)
        else:
            found, hit, _ = self.manager.coordinator.find_longest_cache_hit(
                request.block_hashes, routing.text_prefix
            )
            blocks = [list(of_group) for of_group in found]
        if hit == routing.text_prefix:
            hit = self._extend(request, routing, blocks)
        return self.manager.create_kv_cache_blocks(tuple(blocks)), hit, 0

    def num_offered(self, request: Request) -> int:
        """Leading tokens that the prefix cache has of a live request, in place of vLLM's estimate,
        which looks at every block of every layer."""
        routing = self.live.of(request)
        if not self.manager.enable_caching:
            return 0
        if routing is not None and routing.keeps_turns:
            return self.kept.num_offered(request, routing)
        # Behind the text prefix, a picture's states are offered, and K/V of stages they come from.
        managers = self._stages if routing is None else self._reusable
        counts = [m.num_cached_block.get(request.request_id, 0) for m in managers]
        return min(counts) * self.live.block_size

    def _extend(self, request: Request, routing: RequestRouting, blocks: list[list[Any]]) -> int:
        """Add the first turn's cached blocks behind the text prefix; return the tokens of the whole hit."""
        size, parked = self.live.block_size, self._parked
        null_page = (self.manager.block_pool.null_block,) * parked.num_layers
        begin = routing.text_prefix // size
        turn = routing.turns.turns[0]
        limit = (turn.end - 1) // size
        pages: list[Any] = []
        for block_hash in request.block_hashes[begin:limit]:
            found = [m.cached_blocks(block_hash) for m in self._reusable]
            if not all(found):
                break
            pages.append(found[0])
            for manager, own in zip(self._reusable[1:], found[1:], strict=True):
                blocks[manager.kv_cache_group_id].append(own)
        stops = self.live.stops_of(request, turn)
        while pages and stops_alone(stops, (begin + len(pages)) * size):
            pages.pop()
            for manager in self._reusable[1:]:
                blocks[manager.kv_cache_group_id].pop()
        if pages:
            blocks[parked.kv_cache_group_id] = [null_page] * begin + pages
        return (begin + len(pages)) * size
