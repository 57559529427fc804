"""Which of vLLM's attention backends a routed engine runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms import current_platform

from vllm_reroute.attention.backend import SUPPORTED_BACKENDS
from vllm_reroute.logger import reroute_logger
from vllm_reroute.resolved import dtype_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

logger = reroute_logger(__name__)

_ALLOWED = ", ".join(SUPPORTED_BACKENDS)


def choose_attention_backend(vllm_config: VllmConfig) -> None:
    """Name a backend in the config where vLLM's own choice could not run routed stages.

    On GPUs of compute capability 10 vLLM prefers FlashInfer, whose builder plans over block tables
    in its own way. Raises ValueError for such a backend the user asked for.
    """
    attention = vllm_config.attention_config
    if attention.backend is not None:
        _check("--attention-backend", attention.backend)
    for kind, backend in attention.backend_per_kind.items():
        _check(f"--attention-config with backend_per_kind {kind}", backend)
    if attention.backend is None and current_platform.is_cuda():
        attention.backend = _instead_of_vllms(vllm_config)


def _check(option: str, backend: AttentionBackendEnum) -> None:
    if backend.name not in SUPPORTED_BACKENDS:
        raise ValueError(
            f"{option} {backend.name} cannot be combined with visual-token routing: it plans over "
            f"block tables in its own way. Allowed: {_ALLOWED}. Leave it out and the fastest of them "
            "that this machine has is taken, or serve without --reroute-schedule."
        )


def _instead_of_vllms(vllm_config: VllmConfig) -> AttentionBackendEnum | None:
    """None where vLLM's own choice will do, or where it has none and says so itself."""
    capability = current_platform.get_device_capability()
    valid, _ = current_platform.get_valid_backends(
        capability,
        _selector_config(vllm_config),
        vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config),
    )
    found = [candidate.backend for candidate in sorted(valid, key=lambda c: c.priority)]
    if not found or found[0].name in SUPPORTED_BACKENDS:
        return None
    routed = [backend for backend in found if backend.name in SUPPORTED_BACKENDS]
    if not routed:
        raise ValueError(
            f"Of vLLM's attention backends only {', '.join(b.name for b in found)} fit this GPU and "
            f"model, and none of them can run routed stages. Allowed: {_ALLOWED}. Serve without "
            "--reroute-schedule, or choose another --dtype or --block-size if one was given."
        )
    logger.info(
        "attention backend %s instead of %s, which cannot run routed stages",
        routed[0].name,
        found[0].name,
    )
    return routed[0]


def _selector_config(vllm_config: VllmConfig) -> AttentionSelectorConfig:
    """What vLLM's selector will be asked for by the decoder's layers."""
    import vllm.envs as envs
    from vllm.v1.attention.selector import AttentionSelectorConfig

    model, cache = vllm_config.model_config, vllm_config.cache_config
    return AttentionSelectorConfig(
        head_size=model.get_head_size(),
        dtype=dtype_of(vllm_config),
        kv_cache_dtype=cache.cache_dtype,
        block_size=cache.block_size if cache.user_specified_block_size else None,
        use_batch_invariant=envs.VLLM_BATCH_INVARIANT,
    )
