"""The reroute options a user gives, on the command line or in Python, and their checks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from vllm_reroute.schedule.budget import solve_keep_ratios, tier_keep_ratios
from vllm_reroute.schedule.published import (
    ACTIONS,
    HISTORIES,
    SCHEDULES,
    SCORERS,
    TIERS,
    VARIANTS,
    Action,
    History,
    Schedule,
    Variant,
    scale_decision_layers,
    starts_in_encoder,
)
from vllm_reroute.schedule.routing_schedule import RoutingSchedule
from vllm_reroute.schedule.values import check_choice, check_keep, number, numbers

NO_SCHEDULE = "none"
DEFAULT_ACTION: Action = "reroute"
DEFAULT_TIER = 192
DEFAULT_VARIANT: Variant = "A"
DEFAULT_SCORER = "attention"
DEFAULT_HISTORY: History = "rerank"


@dataclass(frozen=True, kw_only=True)
class RerouteOptions:
    """Options as given; None means not given. Errors speak of the command-line names.

    schedule: a name of `SCHEDULES` or `none`. action: a name of `ACTIONS`. variant: one of
    `VARIANTS`, for `nuwa` with action `reroute`. tier: one of `TIERS`.
    budget: wanted average of visual tokens per layer for a 576-token image.
    layers, keep: decision layers and keep ratios, instead of a schedule. scorer: one of `SCORERS`.
    file: path of a calibrated schedule, which says action, layers and keep. history: one of
    `HISTORIES`. turn_marker: text with which a prompt asks the assistant to speak, instead of what
    the chat template says.
    """

    schedule: str | None = None
    action: Action | None = None
    variant: Variant | None = None
    tier: int | None = None
    budget: float | None = None
    layers: tuple[int, ...] | None = None
    keep: tuple[float, ...] | None = None
    scorer: str | None = None
    file: str | None = None
    history: History | None = None
    turn_marker: str | None = None

    def __post_init__(self) -> None:
        SCHEDULES.check()
        SCORERS.check()
        check_choice("schedule", self.schedule, [*SCHEDULES, NO_SCHEDULE])
        check_choice("action", self.action, ACTIONS)
        check_choice("variant", self.variant, VARIANTS)
        check_choice("tier", self.tier, TIERS)
        check_choice("scorer", self.scorer, list(SCORERS))
        check_choice("history", self.history, HISTORIES)
        self._check_combination()
        self._check_history()
        if self.layers is not None and self.keep is not None:
            _check_custom(self.layers, self.keep)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> RerouteOptions:
        """Options of `additional_config["reroute"]`; lists may be lists, tuples or "2,7,15"."""
        if not isinstance(given, Mapping):
            raise ValueError(
                f"The reroute options {given!r} must be a dictionary, such as {{'schedule': 'pdrop'}}."
            )
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(
                    f"The reroute option {name!r} is unknown. Known options: {', '.join(known)}."
                )
        values = dict(given)
        values["tier"] = number("tier", given.get("tier"), int)
        values["budget"] = number("budget", given.get("budget"), float)
        values["layers"] = numbers("layers", given.get("layers"), int)
        values["keep"] = numbers("keep", given.get("keep"), float)
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """The options that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def active(self) -> bool:
        """Whether these options ask for routing at all."""
        named = (self.schedule or NO_SCHEDULE) != NO_SCHEDULE
        return named or self.layers is not None or self.file is not None

    @property
    def starts_in_encoder(self) -> bool:
        """Whether the vision encoder takes the first decision."""
        return _encoder_first(SCHEDULES.get(self.schedule or NO_SCHEDULE, {}))

    @property
    def _accumulates(self) -> bool:
        # The default one is left alone: it imports vLLM.
        return self.scorer not in (None, DEFAULT_SCORER) and SCORERS[self.scorer].accumulates

    def resolve(self, num_layers: int, first_decision_layer: int = 1) -> RoutingSchedule:
        """The complete schedule for a decoder of `num_layers` layers.

        first_decision_layer: the lowest the model allows. A named schedule that starts below it
        is moved up, decision layers of the user's own are not.

        A file's schedule has taken its place before (`startup/calibrated.py`).

        Raises ValueError when the options do not fit that decoder.
        """
        action = self.action or DEFAULT_ACTION
        if self.layers is not None and self.keep is not None:
            name, layers, keep = "custom", self.layers, self.keep
            _check_depth(layers, num_layers, first_decision_layer)
        else:
            assert self.schedule is not None, "resolve() needs active options"
            name, published = self.schedule, SCHEDULES[self.schedule][action]
            layers = scale_decision_layers(published.layers, num_layers, first_decision_layer)
            keep = self._keep_ratios(published, num_layers, layers)
        if action == "remove":
            keep = tuple(itertools.accumulate(keep, min))
        has_variants = layers[0] == 0 and action == "reroute"
        return RoutingSchedule(
            name=name,
            action=action,
            num_layers=num_layers,
            layers=tuple(layers),
            keep=tuple(keep),
            variant=(self.variant or DEFAULT_VARIANT) if has_variants else None,
            scorer=self.scorer or DEFAULT_SCORER,
            history=self.history or DEFAULT_HISTORY,
        )

    def _keep_ratios(
        self, schedule: Schedule, num_layers: int, layers: Sequence[int]
    ) -> tuple[float, ...]:
        if self.budget is not None:
            return solve_keep_ratios(schedule, num_layers, layers, self.budget)
        return tier_keep_ratios(schedule, num_layers, layers, self.tier or DEFAULT_TIER)

    def _check_combination(self) -> None:
        self._check_file()
        custom = self.layers is not None or self.keep is not None
        if (self.layers is None) != (self.keep is None):
            raise ValueError(
                "--reroute-layers and --reroute-keep belong together: give both, one ratio per "
                "decision layer, or neither."
            )
        if self.tier is not None and self.budget is not None:
            raise ValueError(
                f"--reroute-tier {self.tier} and --reroute-budget {self.budget:g} exclude each "
                "other. Give the published tier or an average of your own."
            )
        for name, value in (
            ("tier", self.tier),
            ("budget", self.budget),
            ("schedule", self.schedule),
        ):
            if custom and value is not None:
                raise ValueError(
                    f"--reroute-{name} {value} has no meaning with --reroute-layers and "
                    "--reroute-keep, which say everything. Drop one or the other."
                )
        self._check_action()
        self._check_variant()
        if self.scorer not in (None, DEFAULT_SCORER) and self.starts_in_encoder:
            raise ValueError(
                f"--reroute-scorer {self.scorer} cannot be combined with --reroute-schedule "
                f"{self.schedule}, whose first choice is the vision encoder's. Allowed: "
                f"{DEFAULT_SCORER}. Leave it out, or take another schedule, at the same average with "
                "--reroute-budget."
            )
        if self._accumulates and self.action == "remove":
            raise ValueError(
                f"--reroute-scorer {self.scorer} cannot be combined with --reroute-action remove: it "
                "adds scores of earlier decisions, but what they ranked low is gone. Allowed: "
                f"{', '.join(_scorers_of_one_decision())}. Or take "
                "--reroute-action reroute."
            )
        extras = [
            n
            for n in ("action", "tier", "budget", "scorer", "history", "turn_marker")
            if getattr(self, n) is not None
        ]
        if extras and not self.active:
            raise ValueError(
                f"--reroute-{extras[0].replace('_', '-')} {getattr(self, extras[0])} needs a schedule. Add "
                f"--reroute-schedule with one of: {', '.join(sorted(SCHEDULES))}."
            )

    def _check_file(self) -> None:
        if self.file is None:
            return
        if not isinstance(self.file, str):
            raise ValueError(f"--reroute-file {self.file!r} must be a path.")
        for name, value in self.to_mapping().items():
            if name not in ("file", "scorer", "history", "turn_marker"):
                raise ValueError(
                    f"--reroute-{name} {value} has no meaning with --reroute-file {self.file}, which "
                    "says everything but --reroute-scorer and --reroute-history. Drop one or the "
                    "other."
                )

    def _check_history(self) -> None:
        marker = self.turn_marker
        if marker is not None and (not isinstance(marker, str) or not marker.strip()):
            raise ValueError(
                f"--reroute-turn-marker {marker!r} must be the text with which a prompt asks the "
                "assistant to speak, such as 'ASSISTANT:'."
            )
        if (self.history or DEFAULT_HISTORY) == DEFAULT_HISTORY and marker is None:
            return
        name, value = (
            ("turn-marker", marker)
            if self.history in (None, DEFAULT_HISTORY)
            else ("history", self.history)
        )
        if self.history == "recall" and self.action == "remove":
            raise ValueError(
                "--reroute-history recall cannot be combined with --reroute-action remove: later turns "
                "bring back what that removes for good. Allowed: rerank, keep. Take one of them, or "
                "--reroute-action reroute."
            )
        if self.starts_in_encoder:
            raise ValueError(
                f"--reroute-{name} {value} cannot be combined with --reroute-schedule {self.schedule}: "
                "its first choice is the vision encoder's, which sees no question. Allowed: "
                f"{', '.join(n for n, of in SCHEDULES.items() if not _encoder_first(of))}. "
                "Take one of them, at the same average with --reroute-budget, or leave it out."
            )
        if self._accumulates:
            raise ValueError(
                f"--reroute-{name} {value} cannot be combined with --reroute-scorer {self.scorer}: stages "
                "hold different tokens of earlier turns, so their scores do not add up. Allowed: "
                f"{', '.join(_scorers_of_one_decision())}. Leave one of them out."
            )

    def _check_action(self) -> None:
        action = self.action or DEFAULT_ACTION
        if self.schedule in (None, NO_SCHEDULE) or action in SCHEDULES[self.schedule]:
            return
        raise ValueError(
            f"--reroute-action {action} is not what --reroute-schedule "
            f"{SCHEDULES.title(self.schedule)} is made for. Allowed: "
            f"{', '.join(SCHEDULES[self.schedule])}. Give one of them with --reroute-action."
        )

    def _check_variant(self) -> None:
        action = self.action or DEFAULT_ACTION
        if self.variant is None or (self.starts_in_encoder and action == "reroute"):
            return
        raise ValueError(
            f"--reroute-variant {self.variant} says what becomes of tokens the vision encoder "
            "rejects. Allowed: only with --reroute-schedule nuwa and --reroute-action reroute. Leave "
            "it out, or choose these."
        )


def _encoder_first(actions: Mapping[Any, Schedule]) -> bool:
    return any(map(starts_in_encoder, actions.values()))


def _scorers_of_one_decision() -> list[str]:
    return [name for name, scorer in SCORERS.items() if not scorer.accumulates]


def _check_custom(layers: Sequence[int], keep: Sequence[float]) -> None:
    shown = ",".join(map(str, layers))
    if len(layers) != len(keep):
        raise ValueError(
            f"--reroute-layers {shown} has {len(layers)} decision layers but --reroute-keep has "
            f"{len(keep)} ratios. Give one ratio per decision layer."
        )
    if not layers:
        raise ValueError("--reroute-layers is empty. Give at least one decision layer.")
    if layers[0] < 1 or any(b <= a for a, b in itertools.pairwise(layers)):
        raise ValueError(
            f"--reroute-layers {shown} must be strictly increasing and start at 1 or later "
            "(layer 0 has nothing to score with). Example: 2,7,15,23."
        )
    check_keep(keep)


def _check_depth(layers: Sequence[int], num_layers: int, first_decision_layer: int) -> None:
    if layers[0] < first_decision_layer:
        raise ValueError(
            f"--reroute-layers {','.join(map(str, layers))} starts too early: this model adds image "
            f"features after its decoder layers 0 to {first_decision_layer - 1} (deepstack), which "
            f"deferred tokens would miss. Start at {first_decision_layer} or later."
        )
    if layers[-1] >= num_layers:
        raise ValueError(
            f"--reroute-layers {','.join(map(str, layers))} must stay below the model's "
            f"{num_layers} decoder layers (0 to {num_layers - 1}). Lower the last one."
        )
