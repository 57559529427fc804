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


class ParkedManager(LayeredManager):
    """A turn's tokens until its decisions have been taken; the first turn's from the text prefix on.

    A table is as long as the prompt: entries before the turn's block are the null block. Pages go
    back to the pool right after the step that takes the decisions is scheduled; the prefix cache
    may still find those of a first turn there. Where it is off, and for later turns, only pages
    that a later step reads are allocated: none for a turn that runs in one step.
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
        computed = interleaving.flat(new_computed_blocks)
        first, end = self._entries(
            request_id, total_computed_tokens, num_tokens, in_one_step=not apply_admission_cap
        )
        held = len(self.req_to_blocks.get(request_id, ())) + len(computed)
        return max(0, end - max(held, first)) + self._get_num_evictable_blocks(computed)

    def add_local_computed_blocks(  # type: ignore[override]  # LayerBlocks
        self,
        request_id: str,
        new_computed_blocks: Sequence[LayerBlocks],
        num_local_computed_tokens: int,
        *args: Any,
    ) -> None:
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, *args
        )
        self._found[request_id] = num_local_computed_tokens

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        first, end = self._entries(request_id, self._found.get(request_id, 0), num_tokens)
        before = len(self.req_to_blocks.get(request_id, ()))
        if end <= max(first, before):
            return []
        held = self.req_to_blocks[request_id]
        held.extend([self._null_block] * (first - before))
        held.extend(self.block_pool.get_new_blocks(end - len(held)))
        return held[before:]

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Offer full pages for reuse."""
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

    def num_held(self) -> int:
        """Pages that hold states, without the entries before the turns that wait."""
        return sum(self._num_held(request_id) for request_id in self.holders)

    def _num_held(self, request_id: str) -> int:
        request = self.live.requests[request_id]
        turn = self.live.turns_of(request).undecided_at(request.num_computed_tokens)
        assert turn is not None, "pages are released with the last decision"
        before = turn.begin // self.block_size * self.num_layers
        return max(0, len(self.req_to_blocks[request_id]) - before)

    def release(self, request_id: str) -> None:
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

    def pop_layer_blocks(self, request_id: str) -> list[LayerBlocks]:
        self._found.pop(request_id, None)
        of_tokens = super().pop_layer_blocks(request_id)
        return [tuple(b for b in blocks if not b.is_null) for blocks in of_tokens]

    def _entries(
        self, request_id: str, num_found: int, num_tokens: int, in_one_step: bool = True
    ) -> tuple[int, int]:
        """Table entries [first, end) that hold pages once `num_tokens` tokens have run.

        num_found: those that the prefix cache had. in_one_step: whether all that is missing runs in
        one step; else whole turns may have to wait in pages, one after the other.
        """
        routing = self.live.of_id(request_id)
        if routing is None:
            return 0, 0
        turns = routing.turns.turns
        num_computed = max(self.live.requests[request_id].num_computed_tokens, num_found)
        if num_computed >= turns[-1].end:
            return 0, 0
        first, end = self._pages(routing, num_computed, num_tokens)
        if not in_one_step and routing.num_prompt > self.live.max_step_tokens:
            each = [(t.begin // self.block_size, cdiv(t.end, self.block_size)) for t in turns]
            first, end = max(each, key=lambda pages: pages[1] - pages[0])
        return first * self.num_layers, end * self.num_layers

    def _pages(
        self, routing: RequestRouting, num_computed: int, num_tokens: int
    ) -> tuple[int, int]:
        """Blocks of tokens [first, end) that are in pages once `num_tokens` tokens have run."""
        size, offered = self.block_size, routing.turns.turns[0]
        if self.live.offers_parked and num_computed < offered.end <= num_tokens:
            return offered.begin // size, offered.end // size
        turn = routing.turns.open_at(num_tokens)
        return (0, 0) if turn is None else (turn.begin // size, cdiv(num_tokens, size))
