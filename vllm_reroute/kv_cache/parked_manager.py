"""Pages of parked states: where a turn's tokens wait between a step and the first decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_reroute.kv_cache import interleaving
from vllm_reroute.kv_cache.interleaving import LayerBlocks
from vllm_reroute.kv_cache.layered_manager import LayeredManager
from vllm_reroute.kv_cache.spec import LayeredSpec
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.turns import Turn


class ParkedManager(LayeredManager):
    """A turn's tokens until its decisions have been taken; the first turn's from the text prefix on.

    A table is as long as the prompt: entries of blocks without parked tokens are the null block. Pages
    go back to the pool right after the step that takes the decisions is scheduled; the prefix cache
    may still find those of a first turn there. Where it is off, and for later turns, only pages
    that a later step reads are allocated: none for a turn that runs in one step.

    Where later turns bring tokens back, all turns' pages stay until the last of them is decided, and
    the prefix cache may find all of them afterwards.
    """

    def __init__(self, kv_cache_spec: LayeredSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._found: dict[str, int] = {}
        """Tokens that the prefix cache had of a request: it does not know of them while it is admitted."""

    def get_num_blocks_to_allocate(  # type: ignore[override]  # LayerBlocks
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[LayerBlocks],
        total_computed_tokens: int,
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """apply_admission_cap: vLLM asks for the whole request at once, to admit it or not."""
        held = self._num_entries(request_id) + len(new_computed_blocks)
        missing = self._missing(
            request_id, held, total_computed_tokens, num_tokens, in_one_step=not apply_admission_cap
        )
        copied = self._goes_on_inside(request_id, len(new_computed_blocks), total_computed_tokens)
        evictable = self._get_num_evictable_blocks(interleaving.flat(new_computed_blocks))
        return self.num_layers * (len(missing) + copied) + evictable

    def add_local_computed_blocks(  # type: ignore[override]  # LayerBlocks
        self,
        request_id: str,
        new_computed_blocks: Sequence[LayerBlocks],
        num_local_computed_tokens: int,
        *args: Any,
    ) -> None:
        count = len(new_computed_blocks)
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, *args
        )
        self._found[request_id] = num_local_computed_tokens
        # What is begun there may be written on; it was not offered by this request.
        whole = num_local_computed_tokens // self.block_size
        self.num_cached_block[request_id] = min(count, whole)
        if self._goes_on_inside(request_id, count, num_local_computed_tokens):
            self._to_copy[request_id] = count - 1

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        self._copy_shared(request_id)
        before = self._num_entries(request_id)
        missing = self._missing(request_id, before, self.num_found(request_id), num_tokens)
        if not missing:
            return []
        held, layers = self.req_to_blocks[request_id], self.num_layers
        pages = iter(self.block_pool.get_new_blocks(len(missing) * layers))
        of_blocks = set(missing)
        for index in range(before, missing[-1] + 1):
            for _ in range(layers):
                held.append(next(pages) if index in of_blocks else self._null_block)
        return held[before * layers :]

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Offer full pages of the first turn for reuse; `KeptTurns` offers the others."""
        routing = self.live.of(request)
        if routing is not None:
            self.offer(request, min(num_tokens, routing.turns.turns[0].end))

    @property
    def holders(self) -> list[str]:
        """Requests that hold pages."""
        return [
            request_id
            for request_id, blocks in self.req_to_blocks.items()
            if blocks and not blocks[-1].is_null
        ]

    def num_found(self, request_id: str) -> int:
        """Tokens that the prefix cache had of a live request."""
        return self._found.get(request_id, 0)

    def num_held(self) -> int:
        """Pages that hold states, without the entries of other tokens."""
        held = (self.req_to_blocks[request_id] for request_id in self.holders)
        return sum(not block.is_null for blocks in held for block in blocks)

    def release_decided(self) -> None:
        """Give back the pages that no later step of their request reads."""
        for request_id in self.holders:
            request = self.live.requests[request_id]
            routing, num_computed = self.live.of(request), request.num_computed_tokens
            assert routing is not None, "only prompts with visual tokens hold pages"
            if routing.turns.open_at(num_computed) is None and not routing.awaits(num_computed):
                self._release(request_id)

    def _release(self, request_id: str) -> None:
        """Every stage has the turn: its parked states are only good for the prefix cache."""
        request, blocks = self.live.requests[request_id], self.req_to_blocks[request_id]
        later = self.live.turns_of(request).undecided_at(request.num_computed_tokens)
        if later is None:
            freed = self.req_to_blocks.pop(request_id)
        else:
            # Tables only grow, so the entries stay, and pages that a later turn begins in.
            kept = later.begin // self.block_size * self.num_layers
            freed = blocks[:kept]
            blocks[:kept] = [self._null_block] * len(freed)
        self.block_pool.free_blocks(block for block in reversed(freed) if not block.is_null)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._found.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def _num_entries(self, request_id: str) -> int:
        """Blocks of tokens in the request's table."""
        return len(self.req_to_blocks.get(request_id, ())) // self.num_layers

    def _goes_on_inside(self, request_id: str, num_found: int, num_tokens: int) -> bool:
        """Whether a request will write into the last of the blocks found for its first `num_tokens`."""
        routing = self.live.of_id(request_id)
        if routing is None or not num_found:
            return False
        later = [turn for turn in routing.turns.with_pictures() if turn.end > num_tokens]
        return bool(later) and max(num_tokens, later[0].begin) < num_found * self.block_size

    def _missing(
        self,
        request_id: str,
        held: int,
        num_found: int,
        num_tokens: int,
        in_one_step: bool = True,
    ) -> list[int]:
        """Numbers of the blocks that need pages once `num_tokens` tokens have run, from `held` on.

        num_found: tokens that the prefix cache had. in_one_step: whether all that is missing runs in
        one step; else whole turns may have to wait in pages, one after the other.
        """
        routing = self.live.of_id(request_id)
        if routing is None:
            return []
        turns = routing.turns.turns
        num_computed = max(self.live.requests[request_id].num_computed_tokens, num_found)
        if num_computed >= turns[-1].end:
            return []
        needed = self._needed(routing, num_computed, num_tokens)
        if not in_one_step and routing.num_prompt > self.live.max_step_tokens:
            each = [self._waiting(turn, turn.end) for turn in routing.turns.with_pictures()]
            needed = each if routing.awaited else [max(each, key=len)]
        return sorted({index for pages in needed for index in pages if index >= held})

    def _needed(self, routing: RequestRouting, num_computed: int, num_tokens: int) -> list[range]:
        """Blocks of tokens that get pages by the time `num_tokens` tokens have run."""
        waiting = routing.turns.open_at(num_tokens)
        needed = [] if waiting is None else [self._waiting(waiting, num_tokens)]
        offered = self.live.offers_parked
        return needed + [
            routing.left_in_pages(turn, self.block_size, offered=offered)
            for turn in routing.turns.with_pictures()
            if num_computed < turn.end <= num_tokens
        ]

    def _waiting(self, turn: Turn, num_tokens: int) -> range:
        """Blocks that a turn's first `num_tokens` tokens fill, those of a turn that has to wait."""
        return range(turn.begin // self.block_size, cdiv(num_tokens, self.block_size))
