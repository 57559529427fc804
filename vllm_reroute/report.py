"""What a user is told about a schedule: the engine's start-up block and the plan table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_reroute.families.deepstack import first_decision_layer
from vllm_reroute.families.visual_tokens import fixed_visual_tokens, visual_tokens_per_image
from vllm_reroute.plan.capacity import candidate_capacity
from vllm_reroute.schedule.footprint import TYPICAL_TEXT_TOKENS, RequestFootprint
from vllm_reroute.schedule.routing_schedule import RoutingSchedule

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

MIB = 2**20

RANKED_BY = {
    "attention": "attention of the last prompt token",
    "accumulated": "attention of the last prompt token, summed over the decisions so far",
    "random": "chance (a baseline: the choice ignores image and question)",
}


def schedule_lines(schedule: RoutingSchedule, num_visual: int) -> list[str]:
    """The schedule and what it keeps of an image of `num_visual` tokens, a line each."""
    what = _fate(removed=not schedule.reroutes)
    variant = f", variant {schedule.variant}" if schedule.variant else ""
    lines = [
        f"schedule          {schedule.name}, action {schedule.action}{variant} (deferred tokens {what})",
        f"decision layers   {', '.join(map(str, schedule.layers))} of {schedule.num_layers}",
        *(
            f"before layer 0    the vision encoder decides, for each image: rejected tokens "
            f"{_fate(removed=decision.removes)}"
            for decision in schedule.decisions
            if decision.scored_at is None
        ),
        f"ranked by         {RANKED_BY[schedule.scorer]}",
        f"keep ratios       {', '.join(f'{r:g}' for r in schedule.keep)}",
        f"visual tokens     {schedule.average(num_visual):.1f} per layer on average, of {num_visual}",
        "",
        "stage   layers   share of visual tokens   visual tokens",
    ]
    for index, (stage, kept) in enumerate(
        zip(schedule.stages, schedule.kept_per_stage(num_visual), strict=True)
    ):
        layers = f"{stage.first_layer}-{stage.end_layer - 1}"
        lines.append(f"{index:>5}   {layers:>6}   {stage.keep_ratio:>22.4g}   {kept:>13}")
    return lines


def _fate(*, removed: bool) -> str:
    return "are gone for good" if removed else "may come back"


def footprint_lines(footprint: RequestFootprint) -> list[str]:
    """KV bytes of one typical request, a line each."""
    dense, routed = footprint.dense_bytes, footprint.routed_bytes
    return [
        f"KV cache per image request ({footprint.num_visual} visual + {footprint.num_text} text "
        f"tokens, blocks of {footprint.block_size}):",
        f"  dense  {dense / MIB:9.3f} MiB",
        f"  routed {routed / MIB:9.3f} MiB  ({routed / dense:.1%} of dense, "
        f"{routed / footprint.ideal_bytes - 1:.1%} above the ideal)",
    ]


def engine_report(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    """The block a routed engine logs once it knows its KV pool."""
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
    rows = candidate_capacity(
        vllm_config.scheduler_config.max_num_batched_tokens, model_config.max_model_len
    )
    row_bytes = model_config.hf_text_config.hidden_size * model_config.dtype.itemsize
    held = rows * row_bytes if schedule.reroutes else 0
    lines = [
        *schedule_lines(schedule, num_visual),
        *model_lines(model_config.hf_config, num_visual),
        "",
        *footprint_lines(footprint),
        f"image requests that fit the KV pool at once: {usable // footprint.routed_blocks} routed, "
        f"{usable * footprint.block_size * footprint.bytes_per_token // footprint.dense_bytes} dense",
        f"deferred-token buffer: {held / MIB:.3f} MiB on every worker "
        f"({rows if held else 0} rows of {row_bytes} bytes), allocated with the model",
    ]
    return "visual-token routing\n" + "\n".join(f"  {line}".rstrip() for line in lines)


def model_lines(hf_config: PretrainedConfig, num_visual: int) -> list[str]:
    """What this model does differently from one with a fixed grid and plain layers."""
    lines = []
    if fixed_visual_tokens(hf_config) is None:
        lines.append(f"images of this model vary in size: {num_visual} visual tokens is an example")
    first = first_decision_layer(hf_config)
    if first > 1:
        lines.append(
            f"image features also enter after layers 0 to {first - 1} (deepstack): the first "
            f"decision layer is {first} or later"
        )
    return [""] * bool(lines) + lines
