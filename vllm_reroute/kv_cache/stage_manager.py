"""Block accounting of one stage: blocks for the tokens that run there only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_reroute.kv_cache import interleaving
from vllm_reroute.kv_cache.interleaving import LayerBlocks
from vllm_reroute.kv_cache.layered_manager import LayeredManager
from vllm_reroute.kv_cache.spec import StageSpec


class StageManager(LayeredManager):
    """Blocks of one stage's layers.

    Every token count the base class turns into blocks is first turned into the entries the request
    really has here (`RequestRouting.kv_length`): deferred and parked tokens need none.

    A hit of a request that keeps its turns may end inside a block. Others go on in that block in
    their own way, so the request gets a copy of it, made before its first step runs.
    """

    def __init__(self, kv_cache_spec: StageSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.stage = kv_cache_spec.stage

    def get_num_blocks_to_allocate(  # type: ignore[override]  # LayerBlocks
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[LayerBlocks],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        slots = self._num_slots(request_id, num_tokens)
        blocks = interleaving.flat(new_computed_blocks)
        copied = self._ends_inside(request_id, new_computed_blocks, num_local_computed_tokens)
        # Whole blocks, to the base; the copy is counted here.
        return copied * self.num_layers + super().get_num_blocks_to_allocate(
            request_id, slots, blocks, 0, 0, *args, **kwargs
        )

    def add_local_computed_blocks(  # type: ignore[override]  # LayerBlocks
        self,
        request_id: str,
        new_computed_blocks: Sequence[LayerBlocks],
        num_local_computed_tokens: int,
        *args: Any,
    ) -> None:
        super().add_local_computed_blocks(request_id, new_computed_blocks, 0, *args)
        if self._ends_inside(request_id, new_computed_blocks, num_local_computed_tokens):
            self._to_copy[request_id] = len(new_computed_blocks) - 1
            self.num_cached_block[request_id] -= 1

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        slots = self._num_slots(request_id, num_tokens)
        self._copy_shared(request_id)
        return super().allocate_new_blocks(request_id, slots, num_tokens_main_model)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Offer full blocks for reuse, layer by layer.

        Of an image request: the whole prompt in a stage before the first decision, where every
        token runs whatever the question; its text prefix in the others, whose later content
        depends on what was kept. `KeptTurns` offers all of a request that keeps its turns.
        """
        routing = self.live.of(request)
        if routing is not None:
            whole = self.stage < routing.dense_stages and not routing.keeps_turns
            end = routing.num_prompt if whole else routing.text_prefix
            num_tokens = min(num_tokens, end)
        self.offer(request, num_tokens)

    def _ends_inside(self, request_id: str, blocks: Sequence[LayerBlocks], num_tokens: int) -> bool:
        """Whether a hit of `num_tokens` tokens leaves room in its last block."""
        if not blocks:
            return False
        return len(blocks) * self.block_size > self._length(request_id, num_tokens)

    def _num_slots(self, request_id: str, num_tokens: int) -> int:
        """Token slots of whole blocks over all layers of the stage, for `num_tokens` tokens."""
        length = self._length(request_id, num_tokens)
        return self.num_layers * cdiv(length, self.block_size) * self.block_size

    def _length(self, request_id: str, num_tokens: int) -> int:
        routing = self.live.of_id(request_id)
        return num_tokens if routing is None else routing.kv_length(self.stage, num_tokens)
