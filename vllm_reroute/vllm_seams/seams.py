"""Private parts of vLLM that routing overrides or relies on, checked when routing is asked for."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import Any

TESTED_VERSIONS = ("0.32", "0.33")
"""Series whose private parts fit. The first has a CPU build; the others ran as previews, see docs/."""


@dataclass(frozen=True)
class Seam:
    """A function, method or class of vLLM and the leading parameters it was tested with."""

    module: str
    qualname: str
    parameters: tuple[str, ...]

    def problem(self) -> str | None:
        """What differs from the tested version, or None."""
        try:
            target: Any = import_module(self.module)
            for name in self.qualname.split("."):
                target = getattr(target, name)
        except (ImportError, AttributeError):
            return f"{self.module}.{self.qualname} is gone"
        found = tuple(inspect.signature(target).parameters)[: len(self.parameters)]
        if found != self.parameters:
            return f"{self.module}.{self.qualname} takes {found} instead of {self.parameters}"
        return None


SEAMS = (
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._try_schedule_encoder_inputs",
        ("self", "request", "num_computed_tokens", "num_new_tokens", "encoder_compute_budget"),
    ),
    Seam("vllm.v1.core.sched.scheduler", "Scheduler.add_request", ("self", "request")),
    Seam("vllm.v1.core.sched.scheduler", "Scheduler._free_request_blocks", ("self", "request")),
    Seam("vllm.v1.core.sched.scheduler", "Scheduler.make_stats", ("self", "spec_decoding_stats")),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    Seam("vllm.v1.worker.worker_base", "WorkerBase.sample_tokens", ("self", "grammar_output")),
    Seam("vllm.v1.worker.worker_base", "WorkerBase.compile_or_warm_up_model", ("self",)),
    Seam(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager.record_prefix_cache_stats",
        ("self", "request", "num_hits"),
    ),
    Seam(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager.estimate_cached_tokens",
        ("self", "request"),
    ),
    Seam(
        "vllm.v1.metrics.loggers",
        "AggregateStatLoggerBase.record",
        ("self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.pop_blocks_for_free",
        ("self", "request_id"),
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.get_num_blocks_to_allocate",
        ("self", "request_id", "num_tokens", "new_computed_blocks"),
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.allocate_new_blocks",
        ("self", "request_id", "num_tokens", "num_tokens_main_model"),
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.add_local_computed_blocks",
        ("self", "request_id", "new_computed_blocks"),
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager._apply_cow",
        ("self", "request_id", "block_idx", "source_block", "cow_block"),
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.cache_blocks",
        ("self", "request", "num_tokens", "retention_interval", "replay_boundaries"),
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.find_longest_cache_hit",
        ("block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec"),
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager", "register_all_kvcache_specs", ("vllm_config",)
    ),
    Seam(
        "vllm.v1.core.block_pool",
        "BlockPool._insert_block_hash",
        ("self", "block_hash_with_group_id", "block", "num_tokens"),
    ),
    Seam(
        "vllm.v1.core.kv_cache_utils",
        "generate_block_hash_extra_keys",
        ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
    ),
    Seam(
        "vllm.model_executor.layers.attention",
        "Attention.get_kv_cache_spec",
        ("self", "vllm_config"),
    ),
    Seam(
        "vllm.v1.attention.selector",
        "AttentionSelectorConfig",
        ("head_size", "dtype", "kv_cache_dtype", "block_size"),
    ),
    Seam(
        "vllm.v1.attention.backend",
        "subclass_attention_backend_with_overrides",
        ("name_prefix", "attention_backend_cls", "overrides"),
    ),
)


def is_tested(version: str) -> bool:
    """Whether a vLLM of that version is of a tested series."""
    return version.startswith(tuple(f"{series}." for series in TESTED_VERSIONS))


def seam_problems() -> list[str]:
    """What of vLLM's private parts differs from the tested versions."""
    return [problem for seam in SEAMS if (problem := seam.problem())]


def check_vllm() -> None:
    """Raises RuntimeError unless this vLLM is a tested version with the expected private parts."""
    import vllm

    problems = seam_problems()
    if not is_tested(vllm.__version__):
        problems.insert(0, f"the version is {vllm.__version__}")
    if problems:
        raise RuntimeError(
            f"vllm_reroute is tested with vLLM {'.* and '.join(TESTED_VERSIONS)}.*, but in this "
            f"installation {'; '.join(problems)}. Install a tested version: pip install "
            f"'vllm=={TESTED_VERSIONS[0]}.*'."
        )
