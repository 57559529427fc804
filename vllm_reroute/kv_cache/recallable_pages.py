"""Parked states of finished turns, from which later turns bring tokens back (`--reroute-history recall`)."""

from __future__ import annotations

from typing import Any

from vllm_reroute.kv_cache.interleaving import LayerBlocks
from vllm_reroute.kv_cache.parked_manager import ParkedManager
from vllm_reroute.kv_cache.turn_keys import TurnKeys
from vllm_reroute.plan.turns import Turn


class RecallablePages:
    """Offers and finds the pages of turns with pictures.

    What a turn brings back must not depend on what is cached: a turn whose pages have been evicted is
    run again, with all that follows it.
    """

    def __init__(self, parked: ParkedManager) -> None:
        self._parked = parked
        self.group: int = parked.kv_cache_group_id

    def offer(self, keys: TurnKeys, turn: Turn) -> None:
        """All states of a turn are in pages once the step just planned has run; those of one that was
        found in the cache have been offered by who ran it."""
        if turn.end <= self._parked.num_found(keys.request.request_id):
            return
        for index in turn.reusable(self._parked.block_size):
            self._parked.put(keys.request.request_id, index, keys.page(turn, index))

    def find(self, keys: TurnKeys, num_tokens: int) -> tuple[list[LayerBlocks], int]:
        """Table entries for a hit of `num_tokens` tokens, and the tokens up to which none is missing."""
        if not keys.routing.awaits(num_tokens):
            return [], num_tokens
        found: dict[int, LayerBlocks] = {}
        for turn in keys.routing.awaited:
            if turn.end > num_tokens:
                break
            for index in turn.recallable(self._parked.block_size):
                pages = self._parked.cached_blocks(keys.page(turn, index))
                if pages is None:
                    return [], turn.begin
                # Of a block that several turns touch, the last one's holds what all of them need.
                found[index] = pages
        null: Any = (self._parked.block_pool.null_block,) * self._parked.num_layers
        return [found.get(index, null) for index in range(max(found, default=-1) + 1)], num_tokens
