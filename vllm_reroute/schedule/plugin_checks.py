"""What is wrong with a schedule or scorer before it is used: its author's mistakes, by name."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

from vllm_reroute.schedule.shapes import first_that_keeps_all

_FIRST_RATIOS = (0.01, 0.1, 0.5, 0.9)


def problem_of_schedule(
    made: Any, actions: tuple[str, ...], tiers: tuple[int, ...], depth: int
) -> str | None:
    """For an object that has to be a mapping of action -> `Schedule`, in words behind "it"."""
    if not isinstance(made, Mapping) or not made or not set(made) <= set(actions):
        return f"must be a mapping of {' and/or '.join(actions)} -> Schedule, not {made!r}"
    for action, schedule in made.items():
        missing = [name for name in ("layers", "keep", "shape") if not hasattr(schedule, name)]
        if missing:
            return f"has no {', '.join(missing)} for {action}: see vllm_reroute.schedule.Schedule"
        wrong = _layers(schedule.layers, depth) or _keep(schedule, tiers) or _shape(schedule)
        if wrong:
            return f"has for {action} {wrong}"
    return None


def problem_of_scorer(made: Any) -> str | None:
    """For an object that has to be a `Scorer` class, in words behind "it"."""
    if not isinstance(made, type) or not hasattr(made, "score"):
        return (
            "must be a class with a method score, a subclass of vllm_reroute.routing.scorers.Scorer"
        )
    if not isinstance(getattr(made, "accumulates", None), bool):
        return "must have accumulates = True or False, which a subclass of Scorer inherits"
    for function, words in (
        (made, ("at",)),
        (made.score, ("self", "stream", "positions", "prompts")),
    ):
        try:
            inspect.signature(function).bind(*words)
        except TypeError as error:
            called = made.__name__ if function is made else f"{made.__name__}.score"
            return f"cannot be called as {called}({', '.join(words)}): {error}"
    return None


def _layers(layers: Any, depth: int) -> str | None:
    whole = all(isinstance(layer, int) for layer in layers)
    if not layers or not whole or any(b <= a for a, b in itertools.pairwise(layers)):
        return f"layers {layers!r}: they must be whole numbers that increase"
    if layers[0] < 0 or layers[-1] >= depth:
        return f"layers {layers!r}: they must lie in 0 to {depth - 1}, layers of a {depth}-layer decoder"
    return None


def _keep(schedule: Any, tiers: tuple[int, ...]) -> str | None:
    for tier, ratios in schedule.keep.items():
        if tier not in tiers:
            return f"a tier {tier!r}: allowed are {', '.join(map(str, tiers))}"
        if len(ratios) != len(schedule.layers) or not all(0.0 < ratio <= 1.0 for ratio in ratios):
            return (
                f"ratios {ratios!r} at tier {tier}: they must be {len(schedule.layers)}, one per "
                "decision layer, in (0, 1]"
            )
    return None


def _shape(schedule: Any) -> str | None:
    decisions = len(schedule.layers)
    before = [0.0] * decisions
    for first in _FIRST_RATIOS:
        try:
            ratios = list(schedule.shape(first, decisions))
        except Exception as error:
            return (
                f"a shape that fails: shape({first}, {decisions}): {type(error).__name__}: {error}"
            )
        if len(ratios) != decisions or not all(
            b > 0 and b >= a for a, b in zip(before, ratios, strict=True)
        ):
            return (
                f"a shape with shape({first}, {decisions}) = {ratios!r}: it must be {decisions} ratios "
                "above 0 that never fall as the first one grows"
            )
        before = ratios
    try:
        first_that_keeps_all(schedule.shape, decisions)
    except ValueError as error:
        return f"a shape that {error}"
    return None
