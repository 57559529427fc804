"""`vllm-reroute schedules`: what can be chosen by name, with true averages."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from vllm_reroute.schedule.budget import tier_keep_ratios
from vllm_reroute.schedule.options import RerouteOptions
from vllm_reroute.schedule.published import PUBLISHED_DEPTH, SCHEDULES, SCORERS, TIERS


def add_schedules(commands: Any) -> None:
    """Add the command to `vllm-reroute`."""
    schedules = commands.add_parser(
        "schedules", help="schedules, tiers and scorers: published ones, and what is installed"
    )
    schedules.set_defaults(run=run)


def run(_: argparse.Namespace) -> list[str]:
    """Raises ValueError naming the distribution where something installed cannot be used."""
    for registry in (SCHEDULES, SCORERS):
        for problem in registry.problems():
            raise ValueError(problem)
    return [
        f"Schedules for a {PUBLISHED_DEPTH}-layer decoder; other depths are scaled.",
        "",
        "schedule  action   tier  decision layers  keep ratios            average of 576",
        *_rows(),
        "",
        "none      serve without routing",
        "",
        f"Scorers: {', '.join(map(SCORERS.title, SCORERS))}",
        *(f"{name} is from {origin}" for name in SCHEDULES if (origin := SCHEDULES.origin(name))),
    ]


def _rows() -> Iterator[str]:
    for name, actions in SCHEDULES.items():
        for action, schedule in actions.items():
            layers = ",".join(map(str, schedule.layers))
            for tier in TIERS:
                row = f"{name:<8}  {action:<7}  {tier:>4}  {layers:<15}  "
                try:
                    ratios = tier_keep_ratios(schedule, PUBLISHED_DEPTH, schedule.layers, tier)
                except ValueError as error:
                    # Its decision layers leave too many dense ones before them.
                    yield f"{row}not reachable: {str(error).partition(': ')[2]}"
                    continue
                options = RerouteOptions(schedule=name, action=action, tier=tier)
                keep = ",".join(f"{r:g}" for r in ratios)
                yield f"{row}{keep:<28} {options.resolve(PUBLISHED_DEPTH).average():>8.1f}"
