"""The decisions of one request, as arrays on the host, and what follows from them.

Visual tokens are numbered 0 … N - 1 in prompt order, through all images and videos of the request.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO

import numpy as np

from vllm_reroute.schedule import RoutingSchedule


@dataclass(frozen=True, kw_only=True)
class TracedDecision:
    """One decision, and the stage it opens.

    layer, end_layer: decoder layers of the stage, the first inclusive, the last exclusive.
    kept: [k] int64, ascending indices of the visual tokens that run in it.
    scores: [N] fp32, higher is kept, NaN where a token was no longer a candidate; None where
    nothing was ranked because all candidates run, or nobody asked.
    """

    layer: int
    end_layer: int
    kept: np.ndarray
    scores: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class RoutingTrace:
    """All decisions of one request.

    num_prompt: prompt tokens, visual ones included. num_visual: N. decisions: by layer, ascending.
    """

    num_prompt: int
    num_visual: int
    decisions: tuple[TracedDecision, ...]


@dataclass(frozen=True, kw_only=True)
class TracedStage:
    """What one stage did with every visual token.

    layers: half-open. kept, deferred, brought_back: [N] bool; a token is brought back if it runs
    here although an earlier stage deferred it. scores: as in `TracedDecision`; None for the dense
    stage before the first decision too.
    """

    layers: tuple[int, int]
    kept: np.ndarray
    brought_back: np.ndarray
    scores: np.ndarray | None

    @property
    def deferred(self) -> np.ndarray:
        return ~self.kept

    @property
    def num_kept(self) -> int:
        return int(self.kept.sum())

    @property
    def num_deferred(self) -> int:
        return int(self.deferred.sum())

    @property
    def num_brought_back(self) -> int:
        return int(self.brought_back.sum())

    @property
    def ranks(self) -> np.ndarray | None:
        """[N] int64, 1 for the highest score, 0 for what was no candidate; None without scores.

        Equal scores rank in the order of the tokens, as when they are chosen.
        """
        if self.scores is None:
            return None
        candidates = np.flatnonzero(~np.isnan(self.scores))
        best_first = candidates[np.argsort(-self.scores[candidates], kind="stable")]
        ranks = np.zeros(len(self.scores), dtype=np.int64)
        ranks[best_first] = np.arange(1, len(best_first) + 1)
        return ranks


def trace_of(told: np.ndarray | str, schedule: RoutingSchedule, num_prompt: int) -> RoutingTrace:
    """The decisions of a request that asked to be told them.

    told: `routed_experts` of its answer, from Python or as HTTP has it. schedule: the engine's;
    a budget of the request's own changes nothing of it that matters here. num_prompt: prompt tokens.
    """
    array = np.load(BytesIO(base64.b64decode(told))) if isinstance(told, str) else told
    scored = array.ndim == 3
    runs = array[..., 0] == 1 if scored else array
    decisions = []
    for number, stage in enumerate(schedule.stages):
        if number == 0 and schedule.encoder_ratio is None:
            continue
        scores = array[:, number, 1].copy() if scored else None
        if scores is not None and np.isnan(scores).all():
            scores = None
        decisions.append(
            TracedDecision(
                layer=stage.first_layer,
                end_layer=stage.end_layer,
                kept=np.flatnonzero(runs[:, number]),
                scores=scores,
            )
        )
    return RoutingTrace(num_prompt=num_prompt, num_visual=len(array), decisions=tuple(decisions))


def stages_of(trace: RoutingTrace) -> tuple[TracedStage, ...]:
    """Every stage in order; a dense one first, unless the first decision is before layer 0."""
    everyone = np.ones(trace.num_visual, dtype=bool)
    ever_deferred = ~everyone
    stages = []
    if trace.decisions and trace.decisions[0].layer > 0:
        layers = (0, trace.decisions[0].layer)
        stages.append(
            TracedStage(layers=layers, kept=everyone, brought_back=~everyone, scores=None)
        )
    for decision in trace.decisions:
        kept = np.zeros(trace.num_visual, dtype=bool)
        kept[decision.kept] = True
        stages.append(
            TracedStage(
                layers=(decision.layer, decision.end_layer),
                kept=kept,
                brought_back=kept & ever_deferred,
                scores=decision.scores,
            )
        )
        ever_deferred = ever_deferred | ~kept
    return tuple(stages)


def average_kept(trace: RoutingTrace) -> float:
    """Visual tokens that run in a decoder layer, averaged over all layers."""
    stages = stages_of(trace)
    layers = [end - first for first, end in (stage.layers for stage in stages)]
    return sum(n * stage.num_kept for n, stage in zip(layers, stages, strict=True)) / sum(layers)
