"""KV cache spec of the layers that share a keep ratio."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PLAIN_CACHE_DTYPES = ("auto", "float32", "float16", "bfloat16")
"""Types of K/V that routing has been tested with."""


@dataclass(frozen=True, kw_only=True)
class RoutedAttentionSpec(FullAttentionSpec):
    """All decoder layers of one keep ratio: one KV cache group, one block table.

    keep_ratio: share of a request's visual tokens that hold K/V here. encoder_ratio: of the
    schedule; it decides how `keep_ratio` counts a request with several images.
    num_layers: layers in the group. A page holds `block_size` tokens of ONE layer and a request
    takes `num_layers` pages per `block_size` tokens, stored next to each other in the group's
    block table: entry `i * num_layers + j` is block `i` of the group's layer `j`. So groups of
    any size share one pool without padding, with as many tables as there are ratios.
    """

    keep_ratio: float
    encoder_ratio: float | None = None
    num_layers: int

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of one request of `max_model_len` text tokens, over all layers of the group."""
        return self.num_layers * super().max_memory_usage_bytes(vllm_config)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Block-table entries of one request."""
        return self.num_layers * super().max_num_blocks_per_req(vllm_config, max_len)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for a group; refuses to mix ratios (the base would drop them silently)."""
        first = specs[0]
        if any(spec != first for spec in specs):
            raise AssertionError("Layers of different keep ratios cannot share a KV cache group.")
        return replace(first)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all specs are this one: different ratios need different numbers of slots."""
        return all(spec == self for spec in kv_cache_specs.values())
