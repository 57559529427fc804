"""The problem the solvers share: which counts may be kept, and what is lost with each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vllm_reroute.calibration.objective import Looks

FINE, STEP = 32, 1.03
"""All counts up to FINE may be kept; above, each is some STEP times the one before."""

AROUND = 0.04
"""A second pass may keep any count so near to one that the first has chosen."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """counts: of a reference image, ascending. tokens: that all layers may run together.

    first_layer: the lowest that may decide. most_decisions: how many there may be.
    """

    num_layers: int
    first_layer: int
    reference: int
    counts: tuple[int, ...]
    tokens: int
    most_decisions: int

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of each count; the middle of the range that gives it, so that no rounding moves it."""
        return tuple(min(1.0, (count + 0.5) / self.reference) for count in self.counts)

    def left_after(self, first_decision: int) -> int:
        """Tokens left for all later layers once those before are dense."""
        return self.tokens - first_decision * self.reference


@dataclass(frozen=True, kw_only=True)
class Found:
    """A solution. loss: as the solver sees it. layers, counts: one of each per decision."""

    loss: float
    layers: tuple[int, ...]
    counts: tuple[int, ...]


def coarse_counts(reference: int) -> tuple[int, ...]:
    """Token counts from 1 to `reference`: every one up to `FINE`, then in growing steps."""
    counts = list(range(1, min(FINE, reference) + 1))
    while counts[-1] < reference:
        counts.append(min(reference, max(counts[-1] + 1, round(counts[-1] * STEP))))
    return tuple(counts)


def finer_counts(counts: Iterable[int], chosen: Iterable[int], reference: int) -> tuple[int, ...]:
    """The counts and all that lie around the chosen ones."""
    near = {
        count
        for middle in chosen
        for count in range(middle - 2 - int(AROUND * middle), middle + 3 + int(AROUND * middle))
    }
    return tuple(sorted({*counts, *(c for c in near if 1 <= c <= reference)}))


def stage_losses(looks: Looks, problem: Problem) -> np.ndarray:
    """What is lost where any token may be chosen: fp32 [samples, decision, layer, count].

    A layer before its decision loses nothing; decisions below the first allowed are left out.
    """
    layers, choices = looks.num_layers, len(problem.counts)
    losses = np.zeros((len(looks.sizes), layers, layers, choices), np.float32)
    counts = np.stack([looks.counts(ratio) for ratio in problem.ratios], axis=1)
    for decision in range(problem.first_layer, layers):
        later = slice(decision, layers)
        kept = looks.kept_worth(looks.order(decision), later, counts)
        losses[:, decision, later] = looks.totals[:, later, None] - kept
    return losses


def lowest_tokens(num_layers: int, first_layer: int, reference: int) -> int:
    """Tokens all layers run together at the least: dense before the first decision, one after."""
    return first_layer * reference + num_layers - first_layer
