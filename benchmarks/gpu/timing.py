"""Times as the report shows them."""

from collections.abc import Sequence


def spread_ms(seconds: Sequence[float]) -> dict | None:
    """Median, 10th and 90th percentile in ms, and of how many; None of none."""
    ordered = sorted(seconds)
    if not ordered:
        return None

    def at(share: float) -> float:
        return round(1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)

    return {"n": len(ordered), "median": at(0.5), "p10": at(0.1), "p90": at(0.9)}
