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
    """

    def __init__(self, kv_cache_spec: StageSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.stage = kv_cache_spec.stage

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[LayerBlocks],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        slots = self._num_slots(request_id, num_tokens)
        blocks = interleaving.flat(new_computed_blocks)
        return super().get_num_blocks_to_allocate(request_id, slots, blocks, *args, **kwargs)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        slots = self._num_slots(request_id, num_tokens)
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
        depends on what was kept.
        """
        routing = self.live.of(request)
        if routing is not None:
            before_decisions = self.stage < routing.dense_stages
            end = routing.num_prompt if before_decisions else routing.text_prefix
            num_tokens = min(num_tokens, end)
        self.offer(request, num_tokens)

    def _num_slots(self, request_id: str, num_tokens: int) -> int:
        """Token slots of whole blocks over all layers of the stage, for `num_tokens` tokens."""
        routing = self.live.of_id(request_id)
        length = num_tokens if routing is None else routing.kv_length(self.stage, num_tokens)
        return self.num_layers * cdiv(length, self.block_size) * self.block_size
