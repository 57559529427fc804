"""The block a routed engine logs once it knows its K/V pool."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_reroute.families.visual_tokens import visual_tokens_per_image
from vllm_reroute.kv_cache.spec import ParkedSpec
from vllm_reroute.plan.capacity import RUNNER_COPIES, candidate_capacity, table_bytes
from vllm_reroute.report import (
    MIB,
    budget_lines,
    footprint_lines,
    model_lines,
    schedule_lines,
)
from vllm_reroute.resolved import dtype_of
from vllm_reroute.schedule import RoutingSchedule
from vllm_reroute.schedule.footprint import TYPICAL_TEXT_TOKENS, RequestFootprint
from vllm_reroute.schedule.published import HISTORIES


def engine_report(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    """Schedule, K/V of a typical request, how many fit, and what else is held."""
    schedule = RoutingSchedule.of(vllm_config)
    model_config = vllm_config.model_config
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    num_visual = visual_tokens_per_image(model_config.hf_config)
    footprint = RequestFootprint(
        schedule=schedule,
        num_visual=num_visual,
        num_text=TYPICAL_TEXT_TOKENS,
        bytes_per_token=spec.page_size_bytes // spec.block_size,
        block_size=spec.block_size,
    )
    # One block of every pool is vLLM's null block.
    usable = kv_cache_config.num_blocks - 1
    lines = [
        *schedule_lines(schedule, num_visual),
        *model_lines(model_config.hf_config, num_visual),
        "",
        *footprint_lines(footprint),
        f"image requests that fit the KV pool at once: {usable // footprint.routed_blocks} routed, "
        f"{usable * footprint.block_size * footprint.bytes_per_token // footprint.dense_bytes} dense",
        *_held_lines(vllm_config, kv_cache_config, footprint),
        *budget_lines(footprint),
        *_history_lines(schedule, slots=kv_cache_config.num_blocks * spec.block_size),
    ]
    return "visual-token routing\n" + "\n".join(f"  {line}".rstrip() for line in lines)


def _held_lines(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, footprint: RequestFootprint
) -> list[str]:
    """Memory beside the K/V of requests."""
    scheduler, model_config = vllm_config.scheduler_config, vllm_config.model_config
    rows = candidate_capacity(scheduler.max_num_batched_tokens, model_config.max_model_len)
    row_bytes = model_config.hf_text_config.hidden_size * dtype_of(vllm_config).itemsize
    held = rows * row_bytes if footprint.schedule.reroutes else 0
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    pages = next(spec.num_layers for spec in specs if isinstance(spec, ParkedSpec))
    size = footprint.block_size
    layers, reqs = footprint.schedule.num_layers, scheduler.max_num_seqs
    tables = table_bytes(layers, reqs, model_config.max_model_len, size)
    runners = RUNNER_COPIES * table_bytes(layers + pages, reqs, model_config.max_model_len, size)
    return [
        f"deferred-token buffer: {held / MIB:.3f} MiB on every worker "
        f"({rows if held else 0} rows of {row_bytes} bytes), allocated with the model",
        f"block tables of all layers: {tables / MIB:.3f} MiB on every worker, and {runners / MIB:.3f} MiB in "
        f"vLLM's runner, allowed for before the K/V pool is sized (layers x sequences x blocks of {size} "
        "tokens of the longest request; less with a lower --max-num-seqs or --max-model-len)",
        f"parked prompt tokens: {pages} K/V blocks for {size} tokens "
        f"({pages * footprint.bytes_per_token} bytes each) until a prompt's decisions are taken; then "
        "only the prefix cache keeps them, while nobody needs the room",
    ]


def _history_lines(schedule: RoutingSchedule, slots: int) -> list[str]:
    """slots: tokens of a layer that the K/V pool has room for."""
    if not schedule.marker:
        return []
    *others, last = [name for name in HISTORIES if name != "recall" or schedule.reroutes]
    lines = [
        f"a request may choose what later turns do with its pictures (reroute_history {', '.join(others)} or "
        f"{last}; here {schedule.history} unless it says so)"
    ]
    if schedule.reroutes:
        lines.append(
            f"which visual tokens stages hold is noted beside the K/V pool: {4 * slots / MIB:.3f} MiB on every "
            "worker, not part of what vLLM measures"
        )
    if schedule.recalls:
        lines.append(
            "states that pictures have parked stay while a later question of the same prompt may bring tokens "
            "back, then in the prefix cache, where later turns find them; once evicted, the layers before "
            "the first decision run the pictures again"
        )
    return lines
