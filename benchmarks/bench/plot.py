"""Lines with the range of the rounds as bars, and bounds without."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

COLOURS = {
    "fastv": "#1f77b4",
    "pdrop": "#d62728",
    "nuwa": "#2ca02c",
    "stock": "black",
    # Tiers, where there is one method.
    "192,": "#1f77b4",
    "64,": "#d62728",
}


def lines(
    path: Path,
    groups: Mapping[str, Sequence[tuple[float, dict]]],
    *,
    xlabel: str,
    ylabel: str,
    bounds: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    log_x: bool = False,
) -> Path:
    """groups: label -> (x, spread's row). bounds: label -> (x, y). The same results give the same file."""
    with rc_context({"svg.hashsalt": "bench", "font.size": 9}):
        figure = Figure(figsize=(8.5, 4.4), layout="constrained")
        axes = figure.subplots()
        for label, points in groups.items():
            ordered = sorted(points, key=lambda point: point[0])
            x = [point for point, _ in ordered]
            y = [row["median"] for _, row in ordered]
            below = [row["median"] - row["low"] for _, row in ordered]
            above = [row["high"] - row["median"] for _, row in ordered]
            axes.errorbar(
                x, y, (below, above), label=label, capsize=2, linewidth=1.2, markersize=4,
                elinewidth=0.8, **_style(label),
            )  # fmt: skip
        for label, bound in (bounds or {}).items():
            axes.plot(*zip(*bound, strict=True), label=label, color="grey", linestyle=":")
        if log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        figure.legend(loc="outside right upper", fontsize=8)
        figure.savefig(path, metadata={"Date": None})
    return path


def _style(label: str) -> dict:
    words = set(label.split())
    line, marker = "-", "o"
    if words & {"remove", "rerank"}:
        line, marker = "--", "s"
    elif "recall" in words:
        line, marker = "-.", "^"
    # Lines of no known kind take turns in matplotlib's own colours.
    first = label.split()[0]
    known = {"color": COLOURS[first]} if first in COLOURS else {}
    return known | {"linestyle": line, "marker": marker}
