"""Tell vLLM which manager serves a routed spec."""

from __future__ import annotations

from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_reroute.kv_cache.manager import RoutedAttentionManager
from vllm_reroute.kv_cache.spec import RoutedAttentionSpec


def register_routed_spec() -> None:
    """Safe to call twice.

    vLLM's own specs go first: the registry stops loading them once it holds anything.
    """
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(
        RoutedAttentionSpec,
        manager_class=RoutedAttentionManager,
        uniform_type_base_spec=RoutedAttentionSpec,
    )
