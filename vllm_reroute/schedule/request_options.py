"""The reroute options of one request: how much of its images each stage keeps, for how long, and
whether it wants to be told."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_reroute.schedule.budget import solve_keep_ratios, tier_keep_ratios
from vllm_reroute.schedule.options import NO_SCHEDULE
from vllm_reroute.schedule.published import HISTORIES, SCHEDULES, TIERS, History, Schedule
from vllm_reroute.schedule.routing_schedule import RoutingSchedule
from vllm_reroute.schedule.values import check_choice, check_keep, number, numbers

KEY = "reroute"
"""Key of a dictionary of options in a request's extra arguments."""

PREFIX = "reroute_"
"""The same options one by one, for HTTP's `vllm_xargs`, which carries no dictionaries."""

ALLOWED = ("tier", "budget", "keep", "schedule", "history", "explain")

SCORES = "scores"

Explain = bool | str
"""What a request wants to be told of its decisions: nothing (False), what every stage kept (True), or
`SCORES`, too."""


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """Options as given; None means not given. They have the names and meanings of the engine's.

    tier, budget: as for the engine. keep: one ratio per decision layer of the engine. schedule: the
    engine's own name, or `none`: every visual token runs everywhere. history: as for the engine.
    explain: what the answer shall say of the decisions.
    """

    tier: int | None = None
    budget: float | None = None
    keep: tuple[float, ...] | None = None
    schedule: str | None = None
    history: History | None = None
    explain: Explain = False

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> RequestOptions | None:
        """From a request's extra arguments, in either spelling; None where there are none.

        Raises ValueError for options a request cannot choose, and for values that make no sense.
        """
        given = _given(extra_args or {})
        if not given:
            return None
        for name, value in given.items():
            if name not in ALLOWED:
                raise ValueError(
                    f"reroute option {name!r} ({value!r}) cannot be chosen by a request. Allowed: "
                    f"{', '.join(ALLOWED)}, as {KEY!r}: {{…}} in extra_args or as {PREFIX}… in "
                    "vllm_xargs. Leave it out; decision layers and action are the server's."
                )
        options = cls(
            tier=number("tier", given.get("tier"), int),
            budget=number("budget", given.get("budget"), float),
            keep=_keep(given.get("keep")),
            schedule=given.get("schedule"),
            history=given.get("history"),
            explain=_explain(given.get("explain")),
        )
        check_choice("history", options.history, HISTORIES)
        options._check_alone(given)
        return options

    def applied(self, schedule: RoutingSchedule) -> RoutingSchedule:
        """The engine's schedule as this request has it.

        Raises ValueError for a request the engine cannot honour.
        """
        if not self.chooses:
            return schedule
        history = self.history or schedule.history
        if history != "rerank" and not schedule.marker:
            raise ValueError(
                f"reroute_history {history!r} needs a server that knows where turns end. Allowed: "
                f"'rerank'. Leave it out, or start the server with --reroute-history {history}, or with "
                "--reroute-turn-marker and the text with which a prompt asks the assistant to speak."
            )
        if history == "recall" and not schedule.reroutes:
            raise ValueError(
                "reroute_history 'recall' brings back what this server's action 'remove' removes for "
                "good. Allowed: 'rerank', 'keep'. Take one of them, or ask a server with "
                "--reroute-action reroute."
            )
        return replace(schedule, keep=self.keep_ratios(schedule), history=history)

    @property
    def chooses(self) -> bool:
        """Whether anything of the engine's schedule is to be another."""
        choices = (self.tier, self.budget, self.keep, self.schedule, self.history)
        return any(choice is not None for choice in choices)

    def keep_ratios(self, schedule: RoutingSchedule) -> tuple[float, ...]:
        """Keep ratios of this request in an engine of that schedule, one per decision layer.

        Raises ValueError for a request the engine cannot honour.
        """
        if schedule.encoder_ratio is not None:
            raise ValueError(
                f"reroute options of a request cannot be combined with the server's schedule "
                f"{schedule.name}: the vision encoder decides first, and what it has chosen for an image "
                "serves every request with that image. Leave them out, or ask a server with another "
                "schedule."
            )
        if self.schedule == NO_SCHEDULE:
            return (1.0,) * len(schedule.layers)
        if self.schedule not in (None, schedule.name):
            raise ValueError(
                f"reroute_schedule {self.schedule!r} is not what this server runs. Allowed: "
                f"{schedule.name!r}, or {NO_SCHEDULE!r} to keep every visual token. Leave it out, or "
                "ask a server with that schedule."
            )
        keep = self._keep_of(schedule)
        return tuple(itertools.accumulate(keep, min)) if not schedule.reroutes else keep

    def _keep_of(self, schedule: RoutingSchedule) -> tuple[float, ...]:
        if self.tier is not None:
            published = self._published(schedule, "tier", self.tier)
            if self.tier not in TIERS:
                raise ValueError(
                    f"reroute_tier {self.tier} is unknown. Choose one of: "
                    f"{', '.join(map(str, TIERS))}; or any average with reroute_budget."
                )
            return tier_keep_ratios(published, schedule.num_layers, schedule.layers, self.tier)
        if self.budget is not None:
            published = self._published(schedule, "budget", f"{self.budget:g}")
            return solve_keep_ratios(published, schedule.num_layers, schedule.layers, self.budget)
        if self.keep is not None:
            if len(self.keep) != len(schedule.layers):
                raise ValueError(
                    f"reroute_keep {','.join(f'{r:g}' for r in self.keep)} has {len(self.keep)} "
                    f"ratios, but this server decides at {len(schedule.layers)} layers "
                    f"({', '.join(map(str, schedule.layers))}). Give one ratio per decision layer."
                )
            return self.keep
        return schedule.keep

    def _published(self, schedule: RoutingSchedule, name: str, value: Any) -> Schedule:
        if schedule.name not in SCHEDULES:
            raise ValueError(
                f"reroute_{name} {value} needs a server with a named schedule; this one has decision "
                f"layers of its own ({', '.join(map(str, schedule.layers))}). Give reroute_keep, one "
                "ratio per decision layer."
            )
        return SCHEDULES[schedule.name][schedule.action]

    def _check_alone(self, given: Mapping[str, Any]) -> None:
        choices = [n for n in ("tier", "budget", "keep") if given.get(n) is not None]
        if self.schedule == NO_SCHEDULE:
            choices.insert(0, "schedule")
        if len(choices) > 1:
            shown = " and ".join(f"reroute_{name} {given[name]}" for name in choices)
            raise ValueError(f"{shown} exclude each other. Give one of them.")


def _given(extra_args: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, from both spellings. Raises ValueError for one given twice."""
    nested = extra_args.get(KEY)
    if nested is not None and not isinstance(nested, Mapping):
        raise ValueError(
            f"{KEY!r}: {nested!r} must be a dictionary, such as {{'tier': 64}}. Over HTTP give the "
            f"options one by one in vllm_xargs: {PREFIX}tier, …"
        )
    given = dict(nested or {})
    for name, value in extra_args.items():
        if name.startswith(PREFIX):
            option = name.removeprefix(PREFIX)
            if option in given:
                raise ValueError(
                    f"{name} {value} and {KEY!r} with {option!r} say it twice. Drop one."
                )
            given[option] = value
    return given


def _explain(value: Any) -> Explain:
    """Raises ValueError for what is neither yes, no nor `SCORES`."""
    # In `vllm_xargs` JSON's true and false arrive as 1 and 0.
    known: dict[Any, Explain] = {None: False, False: False, True: True, SCORES: SCORES}
    if not isinstance(value, bool | int | float | str | None) or value not in known:
        raise ValueError(
            f"reroute_explain {value!r} is unknown. Allowed: true for the visual tokens every stage "
            f"kept, {SCORES!r} for what they were ranked by, too. Leave it out for neither."
        )
    return known[value]


def _keep(value: Any) -> tuple[float, ...] | None:
    # One ratio may come as a plain number.
    ratios = numbers("keep", [value] if isinstance(value, int | float) else value, float)
    if ratios is not None:
        check_keep(ratios, "reroute_keep")
    return ratios
