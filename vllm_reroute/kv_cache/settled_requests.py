"""Requests whose next tokens need no block: nothing is computed for them in a step."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request

from vllm_reroute.kv_cache.live_routing import LiveRouting
from vllm_reroute.kv_cache.stage_manager import StageManager


class SettledRequests:
    """Stands in for `KVCacheManager.allocate_slots`, and calls it where a block is due.

    A request that decodes fills the blocks it has for many steps. The number of tokens up to which
    no stage needs another one, nor completes one that the prefix cache wants, is worked out when
    blocks are allocated, so that a step costs the same whatever the number of stages.
    """

    def __init__(self, manager: KVCacheManager, live: LiveRouting) -> None:
        self.live = live
        self._allocate = manager.allocate_slots
        self._nothing_new = manager.empty_kv_cache_blocks
        self._stages = [
            m for m in manager.coordinator.single_type_managers if isinstance(m, StageManager)
        ]
        self._settled_up_to: dict[str, int] = {}

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """As in vLLM. A waiting request, and one that still runs its prompt, is never settled."""
        computed = request.num_computed_tokens
        if computed >= request.num_prompt_tokens:
            needed = computed + num_new_tokens + kwargs.get("num_lookahead_tokens", 0)
            if needed <= self._settled_up_to.get(request.request_id, 0):
                return self._nothing_new
        blocks = self._allocate(request, num_new_tokens, *args, **kwargs)
        settled = 0 if blocks is None else self._settled(request)
        self._settled_up_to[request.request_id] = settled
        return blocks

    def forget(self, request: Request) -> None:
        """Its blocks are gone: it has been preempted, or is done."""
        self._settled_up_to.pop(request.request_id, None)

    def _settled(self, request: Request) -> int:
        """Tokens the request's blocks hold in every stage.

        Where its blocks go to the prefix cache, no more than leave the next one incomplete: the step
        that completes it offers it.
        """
        request_id, size = request.request_id, self.live.block_size
        held = [len(m.req_to_blocks[request_id]) // m.num_layers * size for m in self._stages]
        routing = self.live.of(request)
        if routing is not None:
            return min(
                room + int(deferred) for room, deferred in zip(held, routing.deferred, strict=True)
            )
        if self.live.offers_parked:
            offered = min(m.num_cached_block.get(request_id, 0) for m in self._stages)
            held.append((offered + 1) * size - 1)
        return min(held)
