"""Medians with their range, and ratios of what was measured in the same round."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of counted rounds; discarded ones are gone already."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        if not values:
            raise ValueError("There is no spread of nothing. Measure one round or more.")
        return cls(
            median=statistics.median(values), low=min(values), high=max(values), count=len(values)
        )

    def as_row(self) -> dict:
        return asdict(self)


def paired(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round, above / below: a round in which the whole machine was slow cancels out."""
    return [one / other for one, other in zip(above, below, strict=True)]


def shown(spread: dict, scale: float = 1.0, digits: int = 2) -> str:
    """A spread's row as tables have it: median (low to high)."""
    middle, low, high = (scale * spread[key] for key in ("median", "low", "high"))
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"
