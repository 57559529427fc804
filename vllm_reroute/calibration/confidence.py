"""How far a calibrated schedule can be trusted: other samples, and samples it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from vllm_reroute.calibration.choice import Wish, choose
from vllm_reroute.calibration.objective import Looks, lost, share_lost
from vllm_reroute.schedule.routing_schedule import RoutingSchedule

RESAMPLES = 2000
RESOLVES = 20
"""Bootstrap samples for which the schedule is chosen anew."""

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What one schedule is expected to lose, a share of all there is, with its 95 % interval.

    difference: this schedule's loss minus the chosen one's, with the interval of paired samples.
    """

    schedule: RoutingSchedule
    share: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What is lost on one half of the samples, by what was chosen on the other, and by the best
    for this half itself."""

    other: float
    own: float

    @property
    def price(self) -> float:
        return self.other - self.own


def expectations(looks: Looks, schedules: Mapping[str, RoutingSchedule]) -> dict[str, Expected]:
    """Of all schedules, by name; the first is the chosen one. The interval is a percentile bootstrap's."""
    losses = {name: lost(looks, s).sum(axis=1) for name, s in schedules.items()}
    totals = looks.totals.sum(axis=1)
    draws = np.random.default_rng(SEED).multinomial(
        len(totals), np.full(len(totals), 1 / len(totals)), RESAMPLES
    )
    drawn = {name: draws @ loss / (draws @ totals) for name, loss in losses.items()}
    chosen = next(iter(schedules))
    share = {name: float(loss.sum() / totals.sum()) for name, loss in losses.items()}
    return {
        name: Expected(
            schedule=schedule,
            share=share[name],
            interval=_middle(drawn[name]),
            difference=share[name] - share[chosen],
            difference_interval=_middle(drawn[name] - drawn[chosen]),
        )
        for name, schedule in schedules.items()
    }


def held_out(looks: Looks, wish: Wish) -> list[HeldOut]:
    """Both ways round, for two halves drawn at random."""
    shuffled = np.random.default_rng(SEED).permutation(len(looks.sizes))
    half = len(shuffled) // 2
    halves = [looks.some(shuffled[:half]), looks.some(shuffled[half:])]
    chosen = [choose(each, wish, quick=True) for each in halves]
    return [
        HeldOut(
            other=share_lost(lost(halves[i], chosen[1 - i]), halves[i].totals),
            own=share_lost(lost(halves[i], chosen[i]), halves[i].totals),
        )
        for i in (0, 1)
    ]


def recurrence(
    looks: Looks, wish: Wish, chosen: RoutingSchedule, tick: Callable[[], None]
) -> dict[int, float]:
    """Of each decision layer, how often samples drawn anew decide there or one layer beside it."""
    rng = np.random.default_rng(SEED)
    found = dict.fromkeys(chosen.layers, 0)
    for _ in range(RESOLVES):
        drawn = looks.some(rng.integers(len(looks.sizes), size=len(looks.sizes)))
        layers = choose(drawn, wish, quick=True).layers
        for layer in found:
            found[layer] += any(abs(layer - other) <= 1 for other in layers)
        tick()
    return {layer: count / RESOLVES for layer, count in found.items()}


def _middle(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
