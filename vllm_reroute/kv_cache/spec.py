"""KV cache specs of a routed engine: one group per stage, and one for parked states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PLAIN_CACHE_DTYPES = ("auto", "float32", "float16", "bfloat16")
"""Types of K/V that routing has been tested with."""


@dataclass(frozen=True, kw_only=True)
class LayeredSpec(FullAttentionSpec):
    """A group whose layers share one block table (`interleaving.py`).

    num_layers: blocks a request takes per `block_size` tokens.
    """

    num_layers: int

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of one request of `max_model_len` text tokens, over all layers of the group."""
        return self.num_layers * super().max_memory_usage_bytes(vllm_config)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Block-table entries of one request."""
        return self.num_layers * super().max_num_blocks_per_req(vllm_config, max_len)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for a group; refuses to mix stages (the base would drop what tells them apart)."""
        first = specs[0]
        if any(spec != first for spec in specs):
            raise AssertionError("Layers of different stages cannot share a KV cache group.")
        return replace(first)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all specs are this one: stages differ in the slots a request needs."""
        return all(spec == self for spec in kv_cache_specs.values())


@dataclass(frozen=True, kw_only=True)
class StageSpec(LayeredSpec):
    """All decoder layers of one stage. stage: its index in the schedule."""

    stage: int


@dataclass(frozen=True, kw_only=True)
class ParkedSpec(LayeredSpec):
    """Pages of parked states: the residual stream at the first decision layer's input.

    num_layers: pages that the states of `block_size` tokens fill.
    """

    @property
    def prefix_cacheable(self) -> bool:
        """vLLM's own lookups skip it; `prefix_hits.py` looks it up for image requests."""
        return False
