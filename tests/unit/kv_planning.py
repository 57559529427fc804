"""How vLLM plans a K/V pool, from where each vLLM series keeps it."""

from __future__ import annotations

from typing import Any

try:
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:  # before 0.33
    from vllm.v1.core import kv_cache_utils as planning

get_kv_cache_groups = planning.get_kv_cache_groups
is_kv_cache_spec_uniform = planning.is_kv_cache_spec_uniform


def get_kv_cache_configs(vllm_config: Any, specs: list[dict], memory: list[int]) -> list[Any]:
    """vLLM's configuration of the pool of each worker."""
    groups = getattr(planning, "get_global_kv_cache_groups", None)
    more = [groups(vllm_config, specs)] if groups else []
    return planning.get_kv_cache_configs(vllm_config, specs, memory, *more)
