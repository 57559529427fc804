"""The published schedules and how they scale to a model's depth.

Decision layers and keep ratios are those of the Reroute paper's code (arXiv 2606.12412)
for FastV (arXiv 2403.06764) and PyramidDrop (arXiv 2410.17247) on LLaVA-1.5-7B, and those of
Nüwa's code (arXiv 2602.02951) for Nüwa.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from vllm_reroute.registry import Registry
from vllm_reroute.schedule.plugin_checks import problem_of_schedule, problem_of_scorer
from vllm_reroute.schedule.shapes import Shape, flat, geometric, halving, seventh

Action = Literal["reroute", "remove"]

ACTIONS: tuple[Action, ...] = ("reroute", "remove")
"""What happens to a deferred visual token: it may come back, or it is gone for good."""

TIERS: tuple[int, ...] = (192, 128, 64)
"""Published budgets: nominal average of visual tokens per layer for a 576-token image."""

Variant = Literal["A", "B"]

VARIANTS: tuple[Variant, ...] = ("A", "B")
"""What `nuwa` with `reroute` does with tokens the vision encoder rejects: gone (A), or deferred
like any other (B)."""

SCORERS: Registry[Any] = Registry(
    kind="scorer",
    group="vllm_reroute.scorers",
    built_in={
        "attention": "vllm_reroute.routing.scorers.attention:LastTokenScorer",
        "accumulated": "vllm_reroute.routing.scorers.accumulated:AccumulatedScorer",
        "random": "vllm_reroute.routing.scorers.random:RandomScorer",
    },
    problem=problem_of_scorer,
)
"""How visual tokens are ranked: by the last prompt token's attention, by its sum over this and all
earlier decisions, or at random, the baseline any ranking has to beat; and what is installed. Name ->
subclass of `routing.scorers.Scorer`, which this room does not import."""

History = Literal["rerank", "keep", "recall"]

HISTORIES: tuple[History, ...] = ("rerank", "keep", "recall")
"""What a later turn of a conversation does with the pictures of earlier ones: its question ranks all
visual tokens anew, finds what the question that came with a picture has kept, or adds to that."""

PUBLISHED_DEPTH = 32
"""Decoder depth the published decision layers are written for (LLaVA-1.5-7B)."""

PUBLISHED_VISUAL_TOKENS = 576
"""Visual tokens of one image the published counts are written for (LLaVA-1.5-7B)."""


class Schedule(Protocol):
    """One method with one action.

    layers: decision layers for a decoder of `PUBLISHED_DEPTH` layers; 0 is the vision encoder's.
    keep: tier -> one keep ratio per decision layer, a share of the original visual tokens. What is
    not there is solved for, by the shape.
    shape: keep ratios as a function of the first one and their number, see `shapes.py`.
    """

    @property
    def layers(self) -> tuple[int, ...]: ...

    @property
    def keep(self) -> Mapping[int, tuple[float, ...]]: ...

    @property
    def shape(self) -> Shape: ...


@dataclass(frozen=True, kw_only=True)
class PublishedSchedule:
    """A `Schedule` as a table says it."""

    layers: tuple[int, ...]
    keep: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    shape: Shape


def starts_in_encoder(schedule: Schedule) -> bool:
    """Whether the vision encoder takes the first decision, before decoder layer 0."""
    return schedule.layers[0] == 0


_NUWA_COUNTS = {192: (336, 48), 128: (224, 32), 64: (112, 16)}
"""Nüwa's tier -> tokens that enter the decoder, tokens from its middle on."""


def _nuwa(num_later: int) -> dict[int, tuple[float, ...]]:
    """Nüwa's keep ratios with `num_later` decisions in the decoder, all to the second count.

    Half a token is added, so that no rounding moves a count.
    """
    return {
        tier: tuple(
            (count + 0.5) / PUBLISHED_VISUAL_TOKENS for count in (first, *[later] * num_later)
        )
        for tier, (first, later) in _NUWA_COUNTS.items()
    }


FASTV: dict[Action, Schedule] = {
    "remove": PublishedSchedule(
        layers=(3,),
        keep={192: (0.2644,), 128: (0.1418,), 64: (0.01916,)},
        shape=flat,
    ),
    "reroute": PublishedSchedule(
        layers=(3, 7, 15, 23),
        keep={192: (0.2644,) * 4, 128: (0.1418,) * 4, 64: (0.01916,) * 4},
        shape=flat,
    ),
}

PDROP: dict[Action, Schedule] = {
    "remove": PublishedSchedule(
        layers=(2, 7, 15, 23),
        keep={
            192: (0.5965, 0.3558, 0.2123, 0.1266),
            128: (0.4570, 0.2088, 0.0954, 0.0436),
            64: (0.2789, 0.0937, 0.0315, 0.0106),
        },
        shape=geometric,
    ),
    "reroute": PublishedSchedule(
        layers=(2, 7, 15, 23),
        keep={
            192: (0.4502, 0.4502, 0.2251, 0.1126),
            128: (0.2655, 0.2655, 0.1328, 0.0664),
            64: (0.1392, 0.1392, 0.0696, 0.0348),
        },
        shape=halving,
    ),
}

NUWA: dict[Action, Schedule] = {
    "remove": PublishedSchedule(layers=(0, 16), keep=_nuwa(1), shape=seventh),
    "reroute": PublishedSchedule(layers=(0, 16, 20, 24, 28), keep=_nuwa(4), shape=seventh),
}


def _problem_of_schedule(made: Any) -> str | None:
    wrong = problem_of_schedule(made, ACTIONS, TIERS, PUBLISHED_DEPTH)
    if wrong is None and made is not NUWA and any(map(starts_in_encoder, made.values())):
        return "decides at layer 0, where only nuwa can: it has nothing to score with. Start at 1"
    return wrong


SCHEDULES: Registry[Mapping[Action, Schedule]] = Registry(
    kind="schedule",
    group="vllm_reroute.schedules",
    built_in={
        "fastv": "vllm_reroute.schedule.published:FASTV",
        "pdrop": "vllm_reroute.schedule.published:PDROP",
        "nuwa": "vllm_reroute.schedule.published:NUWA",
    },
    # No schedule at all, and the user's own decision layers.
    reserved=("none", "custom"),
    problem=_problem_of_schedule,
)
"""name -> action -> schedule: what was published, and what is installed."""


def scale_decision_layers(
    layers: Sequence[int], num_layers: int, first_decision_layer: int = 1
) -> tuple[int, ...]:
    """Move decision layers published for 32 layers to a decoder of another depth.

    The first stays where it is (early layers mix in the image at any depth), unless the model
    allows no decision below `first_decision_layer`; layer 0, the vision encoder's decision, always
    stays. The others go to floor(layer * num_layers / 32), pushed up where needed to stay strictly
    increasing. This gives the published 28-layer positions of Qwen2.5-VL-7B exactly.

    Raises ValueError when they do not fit below `num_layers`.
    """
    scaled = [max(layers[0], first_decision_layer) if layers[0] else 0]
    for layer in layers[1:]:
        scaled.append(max(layer * num_layers // PUBLISHED_DEPTH, scaled[-1] + 1))
    if scaled[-1] >= num_layers:
        raise ValueError(
            f"The schedule's decision layers {tuple(layers)} do not fit a decoder of {num_layers} "
            f"layers: at least {scaled[0] + len(layers)} are needed. Choose fewer decisions with "
            "--reroute-layers and --reroute-keep, or a deeper model."
        )
    return tuple(scaled)
