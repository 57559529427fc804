"""Shapes of schedules: how the keep ratios of all decisions follow from the first one.

A shape takes the first ratio and the number of decisions, and returns a ratio for each of them. It
never falls as the first ratio grows, which may exceed 1, and reaches 1 everywhere; what is above 1
keeps everything. A wanted average is solved for by the first ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Shape = Callable[[float, int], Sequence[float]]

_LARGEST = 2.0**32


def flat(first: float, decisions: int) -> list[float]:
    """The same everywhere (FastV)."""
    return [first] * decisions


def geometric(first: float, decisions: int) -> list[float]:
    """Each decision keeps the same share of what the one before kept (PyramidDrop)."""
    return [first ** (i + 1) for i in range(decisions)]


def halving(first: float, decisions: int) -> list[float]:
    """The first two alike, then half of the one before (PyramidDrop rerouted)."""
    return [first / 2 ** max(0, i - 1) for i in range(decisions)]


def seventh(first: float, decisions: int) -> list[float]:
    """All later ones a seventh of the first (Nüwa)."""
    return [first if i == 0 else first / 7 for i in range(decisions)]


def first_that_keeps_all(shape: Shape, decisions: int) -> float:
    """A first ratio from which on every decision keeps everything.

    Raises ValueError for a shape that does not get there.
    """
    first = 1.0
    while min(shape(first, decisions)) < 1.0:
        first *= 2
        if first > _LARGEST:
            raise ValueError(f"stays below 1 however large the first ratio is ({_LARGEST:g} tried)")
    return first
