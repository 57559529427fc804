"""Accuracy against visual tokens, one line per method: over all questions, and by kind."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PLOT, PLOT_BY_KIND = "quality.svg", "quality-by-kind.svg"
DENSE = "dense"
COLUMNS = 3
# Colour by method; what reroutes is drawn through, what removes is dashed, what does neither dotted;
# variants of rerouting are drawn with dots and dashes, moved decisions with hollow markers.
COLOURS = {
    "random": "#7f7f7f",
    "downsample": "#bcbd22",
    "fastv": "#1f77b4",
    "pdrop": "#d62728",
    "nuwa": "#2ca02c",
    "calibrated": "#17becf",
}
OTHER_COLOUR = "#9467bd"


def draw(found: dict, folder: Path) -> list[Path]:
    """Both plots as SVG; the same results give the same files."""
    with rc_context({"svg.hashsalt": "quality", "font.size": 9}):
        return [_draw_all(found, folder / PLOT), _draw_kinds(found, folder / PLOT_BY_KIND)]


def _draw_all(found: dict, path: Path) -> Path:
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axes = figure.subplots()
    _lines(axes, [(row, row) for row in found["configurations"]])
    axes.set_xlabel("visual tokens per decoder layer, average")
    axes.set_ylabel("accuracy, % (95 % Wilson interval)")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize=8)
    return _save(figure, path)


def _draw_kinds(found: dict, path: Path) -> Path:
    rows = found["configurations"]
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["by_kind"]))
    lines = max(1, math.ceil(len(kinds) / COLUMNS))
    figure = Figure(figsize=(10, 2.8 * lines), layout="constrained")
    grid = figure.subplots(lines, COLUMNS, sharex=True, sharey=True, squeeze=False)
    for axes, kind in zip(grid.flat, kinds, strict=False):
        _lines(axes, [(row, row["by_kind"][kind]) for row in rows if kind in row["by_kind"]])
        axes.set_title(kind, fontsize=9)
    for axes in list(grid.flat)[len(kinds) :]:
        axes.set_visible(False)
    figure.supxlabel("visual tokens per decoder layer, average")
    figure.supylabel("accuracy, % (95 % Wilson interval)")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8)
    return _save(figure, path)


def _lines(axes: Axes, scored: list[tuple[dict, dict]]) -> None:
    """scored: as for `curves`."""
    for method, averages, middles, around in curves(scored):
        axes.errorbar(
            averages, middles, around, label=method, capsize=2, linewidth=1.2,
            markersize=4, elinewidth=0.8, **_style(method),
        )  # fmt: skip
        if method == DENSE:
            axes.axhline(middles[0], color="black", linewidth=0.6, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.25)


def curves(scored: Sequence[tuple[dict, dict]]) -> Iterator[tuple[str, tuple, tuple, tuple]]:
    """Method, visual tokens, accuracies in %, and how far their intervals reach below and above.

    scored: (configuration, its score). Those without an average or an answer are left out.
    """
    shown = [
        (row, score)
        for row, score in scored
        if row["average"] is not None and score["accuracy"] is not None
    ]
    for method in dict.fromkeys(row["method"] for row, _ in shown):
        points = sorted(
            (row["average"], 100 * score["accuracy"], *(100 * end for end in score["interval"]))
            for row, score in shown
            if row["method"] == method
        )
        averages, middles, lows, highs = zip(*points, strict=True)
        below = [max(0.0, middle - low) for middle, low in zip(middles, lows, strict=True)]
        above = [max(0.0, high - middle) for middle, high in zip(middles, highs, strict=True)]
        yield method, averages, middles, (below, above)


def _style(method: str) -> dict:
    if method == DENSE:
        return {"color": "black", "marker": "*"}
    family, *action = method.split()
    how = {
        "reroute": {"linestyle": "-", "marker": "o"},
        "remove": {"linestyle": "--", "marker": "s"},
        "accumulated": {"linestyle": "-.", "marker": "P"},
    }.get(action[0] if action else "", {"linestyle": ":", "marker": "^"})
    if action[1:] == ["B"]:
        how = {"linestyle": "-.", "marker": "D"}
    if {"from", "once", "falling"} & set(action):
        how["markerfacecolor"] = "white"
    return {"color": COLOURS.get(family, OTHER_COLOUR), **how}


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    return path
