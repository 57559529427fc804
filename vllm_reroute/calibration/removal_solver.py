"""The schedule that loses least where deferred tokens are gone: a beam search.

What a stage may keep then depends on what every sample's earlier decisions kept, so no table of states
that is small enough holds all that matters. Partial schedules are carried with the tokens they keep;
those go on whose loss so far, and the least that dynamic programming says may follow if everything
could come back, are lowest. With one decision every schedule is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vllm_reroute.calibration.grid import Found, Problem
from vllm_reroute.calibration.objective import Looks, first_of
from vllm_reroute.calibration.reroute_solver import Tails

BEAM = 16
"""Partial schedules that are carried from one decision to the next."""


@dataclass(frozen=True, kw_only=True)
class _Partial:
    """Decisions so far. spent, lost: by the layers before the last of them.

    stage: [layers + 1], lost by that decision's stage if it ends so many layers on.
    candidates: bool [samples, most visual tokens], what is left.
    """

    layers: tuple[int, ...]
    indices: tuple[int, ...]
    spent: int
    lost: float
    stage: np.ndarray
    candidates: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A next decision, not yet carried out. promise: what may be lost in the end."""

    promise: float
    before: _Partial
    layer: int
    index: int
    spent: int
    lost: float
    stage: np.ndarray


def solve_removal(looks: Looks, losses: np.ndarray, problem: Problem, beam: int) -> Found | None:
    """losses: `stage_losses`, the mean over samples. None if no schedule is within the tokens."""
    tails = Tails(losses, problem, monotone=True)
    # A beam may miss with many decisions what it finds with few.
    each = [_search(looks, problem, tails, n, beam) for n in range(1, problem.most_decisions + 1)]
    return min((found for found in each if found), key=lambda found: found.loss, default=None)


def _search(
    looks: Looks, problem: Problem, tails: Tails, most_decisions: int, beam: int
) -> Found | None:
    nothing = np.zeros(problem.num_layers + 1)
    partials = [_Partial(layers=(), indices=(), spent=0, lost=0.0, stage=nothing, candidates=None)]
    best: Found | None = None
    for decisions in range(most_decisions, 0, -1):
        steps: list[_Step] = []
        for partial in partials:
            for found, going_on in _next_decisions(looks, problem, tails, partial, decisions):
                if found is not None and (best is None or found.loss < best.loss):
                    best = found
                steps = sorted([*steps, *going_on], key=lambda step: step.promise)[:beam]
        partials = [_taken(looks, problem, step) for step in steps]
    return best


def _next_decisions(
    looks: Looks, problem: Problem, tails: Tails, partial: _Partial, decisions: int
) -> Iterator[tuple[Found | None, list[_Step]]]:
    """For every layer that may decide next: the best end there is, and how to go on."""
    first = partial.layers[-1] + 1 if partial.layers else problem.first_layer
    highest = partial.indices[-1] if partial.indices else len(problem.counts) - 1
    ratios = problem.ratios[: highest + 1]
    counts = np.stack([looks.counts(ratio) for ratio in ratios], axis=1)
    kept_counts = np.array(problem.counts[: highest + 1])
    each = problem.counts[partial.indices[-1]] if partial.indices else problem.reference
    for layer in range(first, problem.num_layers):
        since = layer - (partial.layers[-1] if partial.layers else 0)
        spent, lost = partial.spent + since * each, partial.lost + partial.stage[since]
        room = problem.tokens - spent
        if room < problem.num_layers - layer:
            return
        stage = _stage(looks, layer, partial.candidates, counts)
        fits = (problem.num_layers - layer) * kept_counts <= room
        found = None
        if fits.any():
            index = int(np.where(fits, stage[-1], np.inf).argmin())
            layers = (*partial.layers, layer)
            chosen = tuple(problem.counts[i] for i in (*partial.indices, index))
            found = Found(loss=lost + float(stage[-1, index]), layers=layers, counts=chosen)
        steps = []
        if decisions > 1:
            promises = lost + _least_after(
                problem, tails, decisions - 1, layer, kept_counts, room, stage
            )
            steps = [
                _Step(
                    promise=float(promise), before=partial, layer=layer, index=index,
                    spent=spent, lost=lost, stage=stage[:, index],
                )
                for index, promise in enumerate(promises)
                if np.isfinite(promise)
            ]  # fmt: skip
        yield found, steps


def _stage(
    looks: Looks, layer: int, candidates: np.ndarray | None, counts: np.ndarray
) -> np.ndarray:
    """What a stage that starts at `layer` loses, mean over samples, [layers on, counts]."""
    later = slice(layer, looks.num_layers)
    order = looks.order(layer, candidates)
    worth = looks if candidates is None else _left(looks, candidates)
    kept = worth.kept_worth(order, later, counts).mean(axis=0)
    losses = looks.totals[:, later].mean(axis=0)[:, None] - kept
    return np.concatenate([np.zeros_like(losses[:1]), losses.cumsum(axis=0)])


def _left(looks: Looks, candidates: np.ndarray) -> Looks:
    """Tokens that are gone are worth nothing: keeping more than are left brings no more."""
    worth = looks.worth * candidates[:, None]
    return Looks(ranking=looks.ranking, worth=worth, sizes=looks.sizes)


def _least_after(
    problem: Problem,
    tails: Tails,
    decisions: int,
    layer: int,
    kept_counts: np.ndarray,
    room: int,
    stage: np.ndarray,
) -> np.ndarray:
    """The least that may be lost from `layer` on with a further decision, for every count kept there."""
    least = np.full(len(kept_counts), np.inf)
    bounds = np.arange(len(kept_counts))
    for end in range(layer + 1, problem.num_layers):
        left = room - (end - layer) * kept_counts
        after = tails.at(decisions, end)[bounds, left.clip(0, tails.room)]
        total = np.where(left >= 0, stage[end - layer] + after, np.inf)
        np.minimum(least, total, out=least)
    return least


def _taken(looks: Looks, problem: Problem, step: _Step) -> _Partial:
    order = looks.order(step.layer, step.before.candidates)
    counts = looks.counts(problem.ratios[step.index])
    return _Partial(
        layers=(*step.before.layers, step.layer),
        indices=(*step.before.indices, step.index),
        spent=step.spent,
        lost=step.lost,
        stage=step.stage,
        candidates=first_of(order, counts),
    )
