"""Any of vLLM's paged attention backends, made to read a stage's own lengths, blocks and slots.

Follows `vllm/model_executor/layers/attention/cross_attention.py`: wrap the backend's builder,
copy the common metadata, change fields, call super; the impl writes K/V by the metadata's slots.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    CommonAttentionMetadata,
    MultipleOf,
    subclass_attention_backend_with_overrides,
)

from vllm_reroute.attention.metadata import (
    GroupBuffers,
    RoutedAttentionMetadata,
    per_layer_metadata,
)
from vllm_reroute.kv_cache.spec import RoutedAttentionSpec

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

    class RoutedMetadataBuilder(underlying.get_builder_cls()):  # type: ignore[misc]
        """Builds the metadata of one keep ratio."""

        supports_update_block_table = False

        def __init__(
            self,
            kv_cache_spec: RoutedAttentionSpec,
            layer_names: list[str],
            vllm_config: VllmConfig,
            device: torch.device,
            **kwargs: Any,
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)
            layers = vllm_config.compilation_config.static_forward_context
            self.routing_step = layers[layer_names[0]].routing_step
            self.keep_ratio = kv_cache_spec.keep_ratio
            max_len = vllm_config.model_config.max_model_len
            entries = kv_cache_spec.max_num_blocks_per_req(vllm_config, max_len)
            self.buffers = GroupBuffers(
                num_layers=kv_cache_spec.num_layers,
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
        ) -> RoutedAttentionMetadata:
            plan = self.routing_step.plan
            lengths = plan.lengths[self.keep_ratio] if plan else None
            compact = self.buffers.fill(common_attn_metadata, lengths)
            shared = super().build(0, compact, fast_build)
            views = self.buffers.views(compact.num_reqs, compact.num_actual_tokens)
            return RoutedAttentionMetadata(plan, per_layer_metadata(shared, views))

        def build_for_cudagraph_capture(
            self, common_attn_metadata: CommonAttentionMetadata
        ) -> RoutedAttentionMetadata:
            return self.build(0, common_attn_metadata)

        def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
            return False

    class RoutedImpl(underlying.get_impl_cls()):  # type: ignore[misc]
        """Writes K/V and attends with the metadata of the calling layer."""

        def forward(
            self,
            layer: torch.nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: RoutedAttentionMetadata | None,
            output: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            metadata = None
            if attn_metadata is not None:
                metadata = attn_metadata.layers[layer.layer_in_group]
                if not underlying.forward_includes_kv_cache_update:
                    slots = metadata.slot_mapping
                    if len(key) > len(slots):
                        key, value = key[: len(slots)], value[: len(slots)]
                    self.do_kv_cache_update(layer, key, value, kv_cache, slots)
            return super().forward(
                layer, query, key, value, kv_cache, metadata, output, *args, **kwargs
            )

    return subclass_attention_backend_with_overrides(
        name_prefix="Routed",
        attention_backend_cls=underlying,
        overrides={
            "get_builder_cls": lambda: RoutedMetadataBuilder,
            "get_impl_cls": lambda: RoutedImpl,
            "forward_includes_kv_cache_update": True,
            "get_preferred_block_size": lambda default_block_size: smallest_block_size(underlying),
        },
    )
