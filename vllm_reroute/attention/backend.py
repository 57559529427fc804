"""Any of vLLM's paged attention backends, made to read a stage's own lengths, blocks and slots.

Follows `vllm/model_executor/layers/attention/cross_attention.py`: wrap the backend's builder,
copy the common metadata, change fields, call super; the impl writes K/V by the metadata's slots.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
    subclass_attention_backend_with_overrides,
)

from vllm_reroute.attention.metadata import (
    StageMetadata,
    compact_common,
    placed_common,
    undivided_common,
)
from vllm_reroute.attention.step import RoutedStep, real_step
from vllm_reroute.attention.step_tables import StageViews
from vllm_reroute.kv_cache.spec import StageSpec
from vllm_reroute.plan.row_pieces import row_pieces
from vllm_reroute.plan.step_plan import StageLengths, StepPlan
from vllm_reroute.to_device import to_device

# What stands behind the mixin is known where it is used.
if TYPE_CHECKING:
    _StockBuilder = AttentionMetadataBuilder[Any]
else:
    _StockBuilder = object


SUPPORTED_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Backends whose metadata is one `block_table` and one `slot_mapping` over all requests."""


def smallest_block_size(backend: type[AttentionBackend]) -> int:
    """Tokens per block: the fewer, the less a stage of few tokens rounds up."""
    sizes = backend.get_supported_kernel_block_sizes()
    return min(size.base if isinstance(size, MultipleOf) else size for size in sizes)


@functools.lru_cache
def routed_backend(underlying: type[AttentionBackend]) -> type[AttentionBackend]:
    """The routed version of a paged attention backend.

    Raises ValueError for a backend that plans over block tables in its own way.
    """
    if underlying.get_name() not in SUPPORTED_BACKENDS:
        raise ValueError(
            f"--attention-backend {underlying.get_name()} cannot run routed stages. Choose one of: "
            f"{', '.join(SUPPORTED_BACKENDS)}."
        )
    builder, impl = _stage_builder(underlying), _routed_impl(underlying)
    return subclass_attention_backend_with_overrides(
        name_prefix="Routed",
        attention_backend_cls=underlying,
        overrides={
            "get_builder_cls": lambda: builder,
            "get_impl_cls": lambda: impl,
            "forward_includes_kv_cache_update": True,
            "get_preferred_block_size": lambda default_block_size: smallest_block_size(underlying),
        },
    )


class StageMetadataBuilder(_StockBuilder):
    """Builds the metadata of one stage: a mixin in front of a backend's builder."""

    supports_update_block_table = False
    step: RoutedStep | None = None
    """Set by the V1 runner's hook; the V2 runner hands the step to `build`."""

    def __init__(
        self,
        kv_cache_spec: StageSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
        **kwargs: Any,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)
        layers = vllm_config.compilation_config.static_forward_context
        self.stage = kv_cache_spec.stage
        # A graph of the whole model replays with what each builder keeps in tensors of its own.
        mode = vllm_config.compilation_config.cudagraph_mode
        self._shares = mode is None or not mode.has_full_cudagraphs()
        self.tables = layers[layer_names[0]].tables
        self.tables.release_reserve()
        max_len = vllm_config.model_config.max_model_len
        entries = kv_cache_spec.max_num_blocks_per_req(vllm_config, max_len)
        self.tables.allocate(
            block_size=kv_cache_spec.block_size,
            max_reqs=vllm_config.scheduler_config.max_num_seqs,
            max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            max_blocks=entries // kv_cache_spec.num_layers,
            device=device,
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        *,
        step: RoutedStep | None = None,
    ) -> StageMetadata:
        step = real_step(step or self.step, common_attn_metadata)
        if step.plan is None:
            return self.build_for_cudagraph_capture(common_attn_metadata)
        if step.plan.boundary is None:
            # Padding is the runner's, where every stage runs the tokens of the step.
            return self._of_stage(
                step, common_attn_metadata.num_actual_tokens, common_attn_metadata
            )
        plan, lengths = step.plan, step.plan.stages[self.stage]
        if not lengths.num_tokens:
            return StageMetadata(plan, None, None)
        pieces = row_pieces(plan, self.stage, self.tables.max_tokens)
        if pieces:
            of_pieces = tuple(
                (
                    to_device(piece.rows, self.device),
                    self._of_piece(plan, piece.lengths, common_attn_metadata),
                )
                for piece in pieces
            )
            return StageMetadata(plan, None, self.views(common_attn_metadata, 0), of_pieces)
        return self._of_stage(step, lengths.num_tokens, common_attn_metadata)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> StageMetadata:
        views = self.tables.fill_dummy(self.stage, common_attn_metadata)
        placed = placed_common(common_attn_metadata, views)
        return StageMetadata(None, self._stock_build(placed), views)

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def _of_stage(
        self, step: RoutedStep, num_tokens: int, common: CommonAttentionMetadata
    ) -> StageMetadata:
        plan, views = step.plan, self.views(common, num_tokens)
        assert plan is not None, "a dummy run has no stages"
        return StageMetadata(plan, self.shared(step, plan, common, views), views)

    def shared(
        self,
        step: RoutedStep,
        plan: StepPlan,
        common: CommonAttentionMetadata,
        views: StageViews,
    ) -> Any:
        """The backend's own metadata: stages of the same lengths differ in nothing that it looks at."""
        first = plan.like_stage[self.stage] if self._shares else self.stage
        if first not in step.built:
            if plan.boundary is None:
                seen = undivided_common(common, views, plan.seq_lens[self.stage])
            else:
                seen = compact_common(common, views, plan.stages[self.stage])
            step.built[first] = self._stock_build(seen)
        return step.built[first]

    def views(self, common: CommonAttentionMetadata, num_tokens: int) -> StageViews:
        """Of the stage, in a step of that size."""
        return self.tables.views(self.stage, common.num_reqs, num_tokens)

    def _of_piece(
        self, plan: StepPlan, lengths: StageLengths, common: CommonAttentionMetadata
    ) -> StageMetadata:
        views = self.tables.piece_views(self.stage, lengths)
        compact = compact_common(common, views, lengths)
        return StageMetadata(plan, self._stock_build(compact), views)

    def _stock_build(self, common: CommonAttentionMetadata) -> Any:
        """The backend's own metadata."""
        stock: Any = super()
        return stock.build(0, common)


def _stage_builder(underlying: type[AttentionBackend]) -> type:
    stock = underlying.get_builder_cls()
    return type("StageMetadataBuilder", (StageMetadataBuilder, stock), {})


def _routed_impl(underlying: type[AttentionBackend]) -> type:
    class RoutedImpl(underlying.get_impl_cls()):  # type: ignore[misc]
        """Writes K/V and attends with the metadata of the calling layer."""

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: StageMetadata | None,
            output: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            metadata = None
            if attn_metadata is not None:
                metadata = attn_metadata.of_layer(layer.place.index)
                if not underlying.forward_includes_kv_cache_update:
                    num_tokens = metadata.num_actual_tokens
                    if key.shape[0] > num_tokens:
                        key, value = key[:num_tokens], value[:num_tokens]
                    self.do_kv_cache_update(layer, key, value, kv_cache, metadata.slot_mapping)
            return super().forward(
                layer, query, key, value, kv_cache, metadata, output, *args, **kwargs
            )

    return RoutedImpl
