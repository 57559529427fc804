"""In-process engines of the GPU suite."""

from pathlib import Path
from typing import Any

BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")


def build(model: Path, reroute: dict | None, *, trial: bool, **arguments: Any) -> Any:
    """A `vllm.LLM`. reroute: options, None for stock. A trial runs eagerly on CPU, where arguments
    for GPUs are left out."""
    from vllm import LLM

    given: dict[str, Any] = {"model": str(model), "seed": 0, "disable_log_stats": True, **arguments}
    if trial:
        for name in ("attention_backend", "compilation_config", "gpu_memory_utilization"):
            given.pop(name, None)
        given |= {"enforce_eager": True, "dtype": "float32"}
    if reroute is not None:
        given["additional_config"] = {"reroute": reroute}
    return LLM(**given)


def in_use(llm: Any) -> dict:
    """What the engine runs on, for the record."""
    config = llm.llm_engine.vllm_config
    worker = llm.llm_engine.model_executor.driver_worker.worker
    layers = config.compilation_config.static_forward_context.values()
    backends = {layer.get_attn_backend().__name__ for layer in layers}
    captured = getattr(getattr(worker.model_runner, "cudagraph_manager", None), "graphs", None)
    return {
        "backends": sorted(backends),
        "runner": "V2" if worker.use_v2_model_runner else "V1",
        "block_size": config.cache_config.block_size,
        "blocks": config.cache_config.num_gpu_blocks,
        "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
        "full_graphs_captured": len(captured or ()),
        "compilation_mode": int(config.compilation_config.mode),
        "async_scheduling": config.scheduler_config.async_scheduling,
    }
