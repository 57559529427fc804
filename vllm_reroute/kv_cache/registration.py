"""Tell vLLM which manager serves a routed spec."""

from __future__ import annotations

from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_reroute.kv_cache.parked_manager import ParkedManager
from vllm_reroute.kv_cache.spec import ParkedSpec, StageSpec
from vllm_reroute.kv_cache.stage_manager import StageManager

MANAGERS = {StageSpec: StageManager, ParkedSpec: ParkedManager}


def register_routed_specs() -> None:
    """Safe to call twice.

    vLLM's own specs go first: the registry stops loading them once it holds anything.
    """
    register_all_kvcache_specs(None)
    for spec, manager in MANAGERS.items():
        KVCacheSpecRegistry.register(spec, manager_class=manager, uniform_type_base_spec=spec)
