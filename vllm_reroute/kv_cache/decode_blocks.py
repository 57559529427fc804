"""Blocks of requests that decode: nothing is computed in most steps, and all stages at once in the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request

from vllm_reroute.kv_cache.live_routing import LiveRouting
from vllm_reroute.kv_cache.stage_manager import StageManager


class NoBlocks(KVCacheBlocks):
    """No new blocks in any group; says so without looking into every group."""

    def get_block_ids(self, *args: Any, allow_none: bool = False, **kwargs: Any) -> Any:
        return None if allow_none else super().get_block_ids(*args, **kwargs)


class DecodeBlocks:
    """Stands in for `KVCacheManager.allocate_slots`, which asks every group in every step.

    A request that decodes fills the blocks it has for many steps. It is *settled* up to the number
    of tokens at which some stage needs another block, or completes one that the prefix cache wants.
    Waiting requests and those that run their prompt are vLLM's to serve.
    """

    def __init__(self, manager: KVCacheManager, live: LiveRouting) -> None:
        self.live = live
        self.pool = manager.block_pool
        self.max_model_len = manager.max_model_len
        self._stock = manager.allocate_slots
        self._nothing_new = NoBlocks(manager.empty_kv_cache_blocks.blocks)
        managers = manager.coordinator.single_type_managers
        assert not any(m.records_new_block_ids for m in managers), "no K/V of ours is zeroed"
        self._num_groups = len(managers)
        self._stages = sorted(
            (m for m in managers if isinstance(m, StageManager)), key=lambda m: m.stage
        )
        self._settled: dict[str, int] = {}

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """As in vLLM: new blocks per group, None where there is no room."""
        computed, request_id = request.num_computed_tokens, request.request_id
        if computed < request.num_prompt_tokens:
            self._settled.pop(request_id, None)
            return self._stock(request, num_new_tokens, *args, **kwargs)
        end = computed + num_new_tokens
        needed = min(end + kwargs.get("num_lookahead_tokens", 0), self.max_model_len)
        if needed <= self._settled.get(request_id, 0):
            return self._nothing_new
        blocks = self._grow(request, needed)
        if blocks is not None:
            routing = self.live.of(request)
            if routing is None and self.live.offers_parked:
                for manager in self._stages:
                    manager.offer(request, min(end, request.num_tokens))
            self._settled[request_id] = self._settled_up_to(request)
        return blocks

    def forget(self, request: Request) -> None:
        """Its blocks are gone: it has been preempted, or is done."""
        self._settled.pop(request.request_id, None)

    def _grow(self, request: Request, num_tokens: int) -> KVCacheBlocks | None:
        """Give the request the blocks it lacks in any stage; None where there is no room."""
        request_id, size = request.request_id, self.live.block_size
        missing = [
            max(
                0,
                m.num_layers * -(-(num_tokens - deferred) // size)
                - len(m.req_to_blocks[request_id]),
            )
            for m, deferred in zip(self._stages, self._deferred(request), strict=True)
        ]
        if sum(missing) > self.pool.get_num_free_blocks():
            return None
        fresh = iter(self.pool.get_new_blocks(sum(missing)))
        groups: list[list[Any]] = [[] for _ in range(self._num_groups)]
        for manager, count in zip(self._stages, missing, strict=True):
            if count:
                own = [next(fresh) for _ in range(count)]
                manager.req_to_blocks[request_id].extend(own)
                groups[manager.kv_cache_group_id] = own
        return KVCacheBlocks(tuple(groups))

    def _settled_up_to(self, request: Request) -> int:
        request_id, size = request.request_id, self.live.block_size
        limits = [
            len(m.req_to_blocks[request_id]) // m.num_layers * size + deferred
            for m, deferred in zip(self._stages, self._deferred(request), strict=True)
        ]
        if self.live.offers_parked and self.live.of(request) is None:
            # One token less than completes the next block: the step that does offers it.
            limits.append((self._stages[0].num_cached_block.get(request_id, 0) + 1) * size - 1)
        return min(limits)

    def _deferred(self, request: Request) -> Sequence[int]:
        routing = self.live.of(request)
        return [0] * len(self._stages) if routing is None else routing.deferred
