"""Block accounting of one keep ratio: blocks for text and kept visual tokens only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from vllm_reroute.kv_cache.spec import RoutedAttentionSpec
from vllm_reroute.plan.routed_length import routed_length
from vllm_reroute.plan.visual_spans import visual_spans

LayerBlocks = tuple[KVCacheBlock, ...]
"""The blocks that hold the same `block_size` tokens, one per layer of the group."""

_LAYER_ID_SHIFT = 16


class RoutedAttentionManager(FullAttentionManager):
    """Blocks of one `RoutedAttentionSpec` group.

    Every token count the base class turns into blocks is first turned into the slots the request
    really needs here: deferred visual tokens need none. Cached prefixes are passed around as
    lists of `LayerBlocks`, one entry per `block_size` tokens, as the coordinator expects.

    Image requests neither read the prefix cache nor add to it beyond their first visual token:
    from there on a slot's content depends on what was kept.
    """

    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: RoutedAttentionSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.keep_ratio = kv_cache_spec.keep_ratio
        self.encoder_ratio = kv_cache_spec.encoder_ratio
        self.num_layers = kv_cache_spec.num_layers
        self.requests: Mapping[str, Request] = {}
        """Live requests by id; the scheduler puts its own mapping here."""

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[LayerBlocks],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        slots = self._num_slots(request_id, num_tokens)
        blocks = _flatten(new_computed_blocks)
        return super().get_num_blocks_to_allocate(request_id, slots, blocks, *args, **kwargs)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        slots = self._num_slots(request_id, num_tokens)
        return super().allocate_new_blocks(request_id, slots, num_tokens_main_model)

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[LayerBlocks], *args: Any
    ) -> None:
        super().add_local_computed_blocks(request_id, _flatten(new_computed_blocks), *args)
        self.num_cached_block[request_id] = len(new_computed_blocks)

    def pop_layer_blocks(self, request_id: str) -> list[LayerBlocks]:
        """Forget the request; its blocks are the caller's to free."""
        blocks = self.pop_blocks_for_free(request_id)
        layers = self.num_layers
        return [tuple(blocks[i : i + layers]) for i in range(0, len(blocks), layers)]

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Offer full blocks of a prompt's text prefix for reuse, layer by layer."""
        spans = visual_spans(request)
        if spans is not None:
            num_tokens = min(num_tokens, spans.first)
        cached = self.num_cached_block.get(request.request_id, 0)
        full = num_tokens // self.block_size
        if cached >= full:
            return
        blocks = self.req_to_blocks[request.request_id]
        for layer in range(self.num_layers):
            self.block_pool.cache_full_blocks(
                request=request,
                blocks=blocks[layer :: self.num_layers],
                num_cached_blocks=cached,
                num_full_blocks=full,
                block_size=self.block_size,
                kv_cache_group_id=_layer_group_id(self.kv_cache_group_id, layer),
            )
        self.num_cached_block[request.request_id] = full

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: KVCacheSpec,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[LayerBlocks], ...], int]:
        """Longest prefix cached in every layer of the group, as `LayerBlocks` per group."""
        assert isinstance(kv_cache_spec, RoutedAttentionSpec)
        per_group = range(kv_cache_spec.num_layers)
        layer_ids = [_layer_group_id(g, layer) for g in kv_cache_group_ids for layer in per_group]
        by_layer, length = super().find_longest_cache_hit(
            block_hashes, max_length, layer_ids, block_pool, kv_cache_spec, *args, **kwargs
        )
        groups = (by_layer[i : i + len(per_group)] for i in range(0, len(by_layer), len(per_group)))
        return tuple(list(zip(*layers, strict=True)) for layers in groups), length

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Always 0: cascade attention would need equal slots in every request."""
        return 0

    def _num_slots(self, request_id: str, num_tokens: int) -> int:
        """Token slots of whole blocks over all layers of the group, for `num_tokens` tokens."""
        request = self.requests.get(request_id)
        spans = visual_spans(request) if request is not None else None
        length = routed_length(num_tokens, spans, self.keep_ratio, self.encoder_ratio)
        return self.num_layers * cdiv(length, self.block_size) * self.block_size


def _flatten(blocks: Iterable[LayerBlocks]) -> list[KVCacheBlock]:
    return [block for layer_blocks in blocks for block in layer_blocks]


def _layer_group_id(group_id: int, layer: int) -> int:
    """Prefix-cache key of one layer in a group: no two layers of an engine share one."""
    return group_id + (layer << _LAYER_ID_SHIFT)
