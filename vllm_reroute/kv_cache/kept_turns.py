"""The prefix cache of requests whose history keeps its choice (`--reroute-history keep`)."""

from __future__ import annotations

from math import inf
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from vllm_reroute.kv_cache.interleaving import LayerBlocks
from vllm_reroute.kv_cache.live_routing import LiveRouting
from vllm_reroute.kv_cache.offered_ends import OfferedEnds
from vllm_reroute.kv_cache.parked_manager import ParkedManager
from vllm_reroute.kv_cache.recallable_pages import RecallablePages
from vllm_reroute.kv_cache.stage_manager import StageManager
from vllm_reroute.kv_cache.turn_keys import TurnKeys
from vllm_reroute.plan.request_routing import RequestRouting


class KeptTurns:
    """Offers and finds what finished turns have left in every stage.

    K/V of a finished turn depends on earlier tokens only, in all stages, so all of it can be used
    again. Stages hold different numbers of entries for the same tokens, so a hit ends inside a block
    in most of them; `StageManager` copies that block. Where a turn with pictures ends, and where a
    request ends, the block that a stage has begun is offered as it is by then, so that a short answer
    does not cost the picture and the next turn finds all of this one.

    What a step writes is offered once the step has been planned: a copy that a step needs is made
    before the step runs.
    """

    def __init__(self, manager: KVCacheManager, live: LiveRouting) -> None:
        self.manager, self.live = manager, live
        managers = manager.coordinator.single_type_managers
        self._recallable = RecallablePages(
            next(m for m in managers if isinstance(m, ParkedManager))
        )
        self._num_groups = len(managers)
        self._stages = [m for m in managers if isinstance(m, StageManager)]
        self._ends = OfferedEnds(live.block_size, most=manager.block_pool.num_gpu_blocks)
        self._keys: WeakKeyDictionary[Request, TurnKeys] = WeakKeyDictionary()
        self._next: dict[str, float] = {}
        """Token count at which a request has more to offer; infinite for those that keep nothing."""

    def find(self, request: Request, routing: RequestRouting) -> tuple[list[list[Any]], int]:
        """Cached blocks per group, and the tokens whose K/V every stage finds in them.

        Never the prompt's last token, and never a part of a turn but the text before its pictures. Where
        a later question may bring tokens back, no more than whose parked states are found, too.
        """
        keys = self._keys_of(request, routing)
        found = [self._full_blocks(stage, keys) for stage in self._stages]
        most = request.num_tokens - 1
        if routing.explain:
            # What a turn keeps is in no cache: all of them are decided again.
            most = min(most, routing.turns.turns[0].begin)
        chosen, hit = self._longest(keys, found, most)
        pages, reached = self._recallable.find(keys, hit)
        if reached < hit:
            chosen, hit = self._longest(keys, found, reached)
            pages, _ = self._recallable.find(keys, hit)
        groups: list[list[Any]] = [[] for _ in range(self._num_groups)]
        for manager, blocks in zip(self._stages, chosen, strict=True):
            groups[manager.kv_cache_group_id] = blocks
        groups[self._recallable.group] = pages
        return groups, hit

    def _longest(
        self, keys: TurnKeys, found: list[list[LayerBlocks]], most: int
    ) -> tuple[list[list[LayerBlocks]], int]:
        """The longest hit of no more than `most` tokens: blocks per stage, and its tokens."""
        routing, turns = keys.routing, keys.routing.turns
        hit = min(
            most,
            *(
                self._reach(m, routing, len(own))
                for m, own in zip(self._stages, found, strict=True)
            ),
        )
        hit = turns.allowed(hit)
        chosen = self._up_to(hit, keys, found)
        assert chosen is not None
        for end in self._ends.between(keys.request, hit, most):
            at_end = self._up_to(end, keys, found) if turns.allowed(end) == end else None
            if at_end is not None:
                hit, chosen = end, at_end
                break
        return chosen, hit

    def offer(self, request: Request) -> None:
        """Offer what the step just planned adds to a request."""
        if request.num_computed_tokens < self._next.get(request.request_id, 0):
            return
        routing = self.live.of(request)
        if routing is None or not routing.keeps_turns:
            self._next[request.request_id] = inf
            return
        keys = self._keys_of(request, routing)
        # Tokens that are drafts, or not known yet, do not count.
        num_tokens = min(request.num_computed_tokens, request.num_tokens)
        for manager in self._stages:
            self._offer_full(manager, keys, num_tokens)
        before = self._next.get(request.request_id, 0)
        for turn in routing.turns.turns:
            if before <= turn.end <= num_tokens:
                self._offer_part(turn.end, keys)
                if routing.recalls and not turn.recalls:
                    self._recallable.offer(keys, turn)
        self._next[request.request_id] = self._next_offer(keys, num_tokens)

    def ended(self, request: Request) -> None:
        """Offer all that a request has, as it is about to be freed."""
        num_tokens = min(request.num_computed_tokens, request.num_tokens)
        routing = self.live.of(request)
        if routing is None or not routing.keeps_turns or num_tokens == 0:
            return
        if routing.turns.allowed(num_tokens) == num_tokens:
            self._offer_part(num_tokens, self._keys_of(request, routing))

    def num_offered(self, request: Request, routing: RequestRouting) -> int:
        """Leading tokens that every stage has offered of a live request."""
        num_tokens = min(request.num_computed_tokens, request.num_tokens)
        of_stages = [
            self._reach(m, routing, m.num_cached_block.get(request.request_id, 0))
            for m in self._stages
        ]
        # Where a turn ends, all of it is offered, the block it ends in included.
        ends = [turn.end for turn in routing.turns.turns if turn.end <= num_tokens]
        return max(routing.turns.allowed(min(of_stages)), *ends, 0)

    def forget(self, request: Request) -> None:
        """Its blocks are gone: it has been preempted, or is done."""
        self._next.pop(request.request_id, None)

    def _keys_of(self, request: Request, routing: RequestRouting) -> TurnKeys:
        if request not in self._keys:
            self._keys[request] = TurnKeys(request, routing, self.live.block_size)
        return self._keys[request]

    def _full_blocks(self, manager: StageManager, keys: TurnKeys) -> list[LayerBlocks]:
        blocks: list[LayerBlocks] = []
        while (key := keys.full(manager.stage, len(blocks))) is not None:
            own = manager.cached_blocks(key)
            if own is None:
                break
            blocks.append(own)
        return blocks

    def _reach(self, manager: StageManager, routing: RequestRouting, num_blocks: int) -> int:
        """Tokens whose entries in a stage are in its first blocks."""
        length = num_blocks * self.live.block_size
        if manager.stage < routing.dense_stages:
            return length
        return routing.turns.reach(manager.stage, length)

    def _up_to(
        self, num_tokens: int, keys: TurnKeys, found: list[list[LayerBlocks]]
    ) -> list[list[LayerBlocks]] | None:
        """Blocks of each stage that hold its entries for `num_tokens` tokens; None if one is missing."""
        chosen = []
        for manager, own in zip(self._stages, found, strict=True):
            index, rest = divmod(
                keys.routing.kv_length(manager.stage, num_tokens), self.live.block_size
            )
            if len(own) >= index + bool(rest):
                chosen.append(own[: index + bool(rest)])
                continue
            last = manager.cached_blocks(keys.filled_up_to(num_tokens, index)) if rest else None
            if last is None or len(own) < index:
                return None
            chosen.append([*own[:index], last])
        return chosen

    def _offer_full(self, manager: StageManager, keys: TurnKeys, num_tokens: int) -> None:
        request_id = keys.request.request_id
        index = manager.num_cached_block.get(request_id, 0)
        while keys.needed(manager.stage, index) <= num_tokens:
            key = keys.full(manager.stage, index)
            assert key is not None
            manager.put(request_id, index, key)
            index += 1
        manager.num_cached_block[request_id] = index

    def _offer_part(self, num_tokens: int, keys: TurnKeys) -> None:
        self._ends.add(keys.request, num_tokens)
        for manager in self._stages:
            length = keys.routing.kv_length(manager.stage, num_tokens)
            index, rest = divmod(length, self.live.block_size)
            if rest:
                key = keys.filled_up_to(num_tokens, index)
                manager.put(keys.request.request_id, index, key)

    def _next_offer(self, keys: TurnKeys, num_tokens: int) -> int:
        request_id = keys.request.request_id
        counts = [keys.needed(m.stage, m.num_cached_block.get(request_id, 0)) for m in self._stages]
        end = keys.routing.turns.next_end(num_tokens)
        return min(counts if end is None else [*counts, end])
