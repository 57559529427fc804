"""From recorded looks to the schedule that loses least of them within a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_reroute.calibration.grid import (
    Found,
    Problem,
    coarse_counts,
    finer_counts,
    lowest_tokens,
    stage_losses,
)
from vllm_reroute.calibration.objective import Looks
from vllm_reroute.calibration.removal_solver import BEAM, solve_removal
from vllm_reroute.calibration.reroute_solver import Tails
from vllm_reroute.schedule.published import Action
from vllm_reroute.schedule.routing_schedule import RoutingSchedule

DIGITS = 5
"""Of a printed keep ratio: enough for every count of some thousand tokens."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a schedule is to be. share: of visual tokens, the average over layers.

    first_layer: the lowest decision layer the model allows. monotone: no stage keeps more than the
    one before it; removal is so in any case.
    """

    share: float
    first_layer: int
    most_decisions: int
    action: Action
    monotone: bool

    def problem(self, looks: Looks) -> Problem:
        """Raises ValueError, naming the lowest share that can be met, if this one cannot."""
        reference, layers = looks.reference, looks.num_layers
        tokens = int(self.share * reference * layers + 1e-6)
        lowest = lowest_tokens(layers, self.first_layer, reference)
        if tokens < lowest:
            least = lowest / (reference * layers)
            raise ValueError(
                f"--budget {self.share:.1%} of the visual tokens cannot be met: with the first "
                f"decision at layer {self.first_layer} of {layers}, the lowest this model allows, and "
                f"one token in every layer after it the average is {least:.1%}. Choose a higher one."
            )
        return Problem(
            num_layers=layers,
            first_layer=self.first_layer,
            reference=reference,
            counts=coarse_counts(reference),
            tokens=tokens,
            most_decisions=self.most_decisions,
        )


def choose(looks: Looks, wish: Wish, *, quick: bool = False) -> RoutingSchedule:
    """The schedule that loses least.

    quick: counts no finer than the first pass's, and for removal a beam of two: for asking again
    and again with other samples.
    """
    problem = wish.problem(looks)
    found = _solve(looks, problem, wish, beam=2 if quick else BEAM)
    if not quick:
        counts = finer_counts(problem.counts, found.counts, problem.reference)
        finer = _solve(looks, replace(problem, counts=counts), wish, beam=BEAM)
        found = min(found, finer, key=lambda each: each.loss)
    return _schedule(found, problem, wish)


def _solve(looks: Looks, problem: Problem, wish: Wish, *, beam: int) -> Found:
    losses = stage_losses(looks, problem).mean(axis=0, dtype="float64")
    if wish.action == "remove":
        found = solve_removal(looks, losses, problem, beam)
    else:
        found = Tails(losses, problem, monotone=wish.monotone).best()
    assert found is not None, "the problem was checked to have a solution"
    return found


def _schedule(found: Found, problem: Problem, wish: Wish) -> RoutingSchedule:
    """Without decisions that change nothing: removal that keeps as many as were left."""
    decisions = [
        (layer, count)
        for i, (layer, count) in enumerate(zip(found.layers, found.counts, strict=True))
        if wish.action == "reroute" or i == 0 or count < found.counts[i - 1]
    ]
    layers, counts = zip(*decisions, strict=True)
    ratios = replace(problem, counts=counts).ratios
    return RoutingSchedule(
        name="calibrated",
        action=wish.action,
        num_layers=problem.num_layers,
        layers=layers,
        keep=tuple(round(ratio, DIGITS) for ratio in ratios),
    )
