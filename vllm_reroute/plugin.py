"""Entry point of the `vllm.general_plugins` group: what is registered with vLLM."""

from __future__ import annotations

from vllm_reroute.families.table import FAMILIES, nuwa_name, routed_name
from vllm_reroute.startup.engine_args import ENGINE_ARGS


def register() -> None:
    """Make the flags and the routed architectures known; safe to call in every process, twice.

    Nothing changes for an engine without reroute options: the architectures have names of their
    own, and the KV cache spec is only used by their layers.
    """
    from vllm import ModelRegistry

    from vllm_reroute.kv_cache.registration import register_routed_specs

    register_routed_specs()
    for family in FAMILIES:
        ModelRegistry.register_model(routed_name(family.architecture), family.model_class)
        if family.nuwa_class is not None:
            ModelRegistry.register_model(nuwa_name(family.architecture), family.nuwa_class)
    for hook in ENGINE_ARGS:
        hook.install()
