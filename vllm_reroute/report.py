"""What a user is told about a schedule, at start and by `vllm-reroute plan`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_reroute.families.deepstack import first_decision_layer
from vllm_reroute.families.visual_tokens import fixed_visual_tokens
from vllm_reroute.schedule.footprint import RequestFootprint
from vllm_reroute.schedule.options import NO_SCHEDULE
from vllm_reroute.schedule.published import SCHEDULES, SCORERS, TIERS
from vllm_reroute.schedule.recall import RECALL_CAP, RECALL_SHARE
from vllm_reroute.schedule.request_options import RequestOptions
from vllm_reroute.schedule.routing_schedule import RoutingSchedule

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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
        f"schedule          {_named(schedule.name)}, action {schedule.action}{variant} (deferred tokens {what})",
        f"decision layers   {', '.join(map(str, schedule.layers))} of {schedule.num_layers}",
        *(
            f"before layer 0    the vision encoder decides, for each image: rejected tokens "
            f"{_fate(removed=decision.removes)}"
            for decision in schedule.decisions
            if decision.scored_at is None
        ),
        f"ranked by         {RANKED_BY.get(schedule.scorer) or SCORERS.title(schedule.scorer)}",
        *_history_lines(schedule, num_visual),
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


def _history_lines(schedule: RoutingSchedule, num_visual: int) -> list[str]:
    if not schedule.keeps_turns:
        return []
    lines = [
        "earlier turns     keep what their own question has chosen (turns end with tokens "
        f"{', '.join(map(str, schedule.marker)) or 'that the engine looks up at start'})"
    ]
    if schedule.recalls:
        most = [min(num_visual, RECALL_CAP * kept) for kept in schedule.kept_per_stage(num_visual)]
        lines += [
            f"later questions   without a picture bring back up to {RECALL_SHARE:g} of what a stage keeps, "
            "one token at least, until",
            f"                  it holds {RECALL_CAP} times that: of {num_visual} visual tokens at most "
            f"{', '.join(map(str, most))}, stage by stage",
        ]
    return lines


def _named(name: str) -> str:
    """With the distribution it is from; a user's own decision layers have none."""
    return SCHEDULES.title(name) if name in SCHEDULES else name


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


def budget_lines(footprint: RequestFootprint) -> list[str]:
    """What a request that chooses its own budget may hold, a line each."""
    schedule = footprint.schedule
    if schedule.encoder_ratio is not None:
        return []
    tiers = TIERS if schedule.name in SCHEDULES else ()
    asks = {f"reroute_tier {tier}": RequestOptions(tier=tier) for tier in tiers}
    asks[f"reroute_schedule {NO_SCHEDULE}"] = RequestOptions(schedule=NO_SCHEDULE)
    costs = []
    for name, options in asks.items():
        try:
            chosen = replace(schedule, keep=options.keep_ratios(schedule))
        except ValueError:
            # A tier that these decision layers cannot meet: a request for it is told so.
            continue
        costs.append(
            f"{replace(footprint, schedule=chosen).routed_bytes / MIB:.3f} MiB with {name}"
        )
    return [
        "a request may choose its own budget (reroute_tier, reroute_budget, reroute_keep or "
        f"reroute_schedule {NO_SCHEDULE}): the pool is one, and each is admitted by its own K/V, "
        f"{', '.join(costs)}"
    ]


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
