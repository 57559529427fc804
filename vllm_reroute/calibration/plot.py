"""Attention kept per layer, chosen schedule against published ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vllm_reroute.calibration.objective import Looks, lost
from vllm_reroute.schedule.routing_schedule import RoutingSchedule

COLOURS = {"fastv": "#1f77b4", "pdrop": "#d62728"}


def draw(looks: Looks, schedules: Mapping[str, RoutingSchedule], path: Path) -> None:
    """An SVG; the first schedule is the chosen one. Layers with nothing to lose keep all."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    totals = looks.totals.sum(axis=0)
    with rc_context({"svg.hashsalt": "calibration", "font.size": 9}):
        figure = Figure(figsize=(8.5, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, (name, schedule) in enumerate(schedules.items()):
            loss = lost(looks, schedule).sum(axis=0)
            kept = 1 - np.divide(loss, totals, out=np.zeros_like(loss), where=totals > 0)
            axes.plot(range(len(kept)), 100 * kept, label=name, **_style(name, chosen=not number))
        chosen = next(iter(schedules.values()))
        for layer in chosen.layers:
            axes.axvline(layer, color="#bbbbbb", linestyle=":", linewidth=1)
        axes.set(xlabel="decoder layer", ylabel="kept of what is looked at, %", ylim=(-2, 102))
        figure.legend(loc="outside right upper", fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def _style(name: str, *, chosen: bool) -> dict:
    if chosen:
        return {"color": "black", "linewidth": 2}
    family, action = name.split()
    return {
        "color": COLOURS.get(family, "#9467bd"),
        "linewidth": 1,
        "linestyle": "--" if action == "remove" else "-",
    }
