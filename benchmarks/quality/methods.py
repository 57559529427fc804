"""The table of methods, and the configurations that measure them at wanted budgets.

A budget is a share of the image's visual tokens, averaged over decoder layers. What is compared is the
average a configuration really has, which the schedule's arithmetic gives and the server confirms.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

from benchmarks.grounding.calibrate import REMOVE, REMOVE_ONCE, REROUTE, REROUTE_FALLING, Kind
from benchmarks.quality.model_shape import ModelShape
from vllm_reroute.calibration.file import CalibratedSchedule
from vllm_reroute.schedule import RerouteOptions, RoutingSchedule
from vllm_reroute.schedule.budget import (
    REFERENCE_VISUAL_TOKENS,
    average_visual_tokens,
    solve_keep_ratios,
)
from vllm_reroute.schedule.published import (
    SCHEDULES,
    Action,
    PublishedSchedule,
    Schedule,
    Variant,
    scale_decision_layers,
    starts_in_encoder,
)

# Ratios are solved for an image of REFERENCE_VISUAL_TOKENS; rounding on this model's smaller image is made up for by
# looking so many of its tokens around the wanted average, in steps of a fraction of one.
TOKENS_AROUND = 2
STEPS_PER_TOKEN = 16

# Average for the reference image -> options that have it.
OptionsFor = Callable[[float], RerouteOptions]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """A schedule of `SCHEDULES` as one method uses it.

    first_layer: takes the place of its first decision layer. flags: further flags of the server.
    """

    schedule: str
    action: Action
    variant: Variant | None = None
    first_layer: int | None = None
    flags: tuple[str, ...] = ()

    @property
    def schedule_for_32(self) -> Schedule:
        published = SCHEDULES[self.schedule][self.action]
        if self.first_layer is None:
            return published
        return _with_layers(published, (self.first_layer, *published.layers[1:]))


def _with_layers(schedule: Schedule, layers: tuple[int, ...]) -> Schedule:
    return PublishedSchedule(layers=layers, keep=schedule.keep, shape=schedule.shape)


DENSE, DOWNSAMPLE = "dense", "downsample"
ACCUMULATED = ("--reroute-scorer", "accumulated")
# None: not routed. A kind of calibrated schedule is one file per budget, made for one model.
METHODS: dict[str, Routing | Kind | None] = {
    DENSE: None,
    "random": Routing(schedule="fastv", action="remove", flags=("--reroute-scorer", "random")),
    DOWNSAMPLE: None,
    "fastv remove": Routing(schedule="fastv", action="remove"),
    "fastv reroute": Routing(schedule="fastv", action="reroute"),
    "pdrop remove": Routing(schedule="pdrop", action="remove"),
    "pdrop reroute": Routing(schedule="pdrop", action="reroute"),
    "fastv accumulated": Routing(schedule="fastv", action="reroute", flags=ACCUMULATED),
    "pdrop accumulated": Routing(schedule="pdrop", action="reroute", flags=ACCUMULATED),
    "pdrop remove from 3": Routing(schedule="pdrop", action="remove", first_layer=3),
    "pdrop reroute from 3": Routing(schedule="pdrop", action="reroute", first_layer=3),
    "nuwa remove": Routing(schedule="nuwa", action="remove"),
    "nuwa reroute A": Routing(schedule="nuwa", action="reroute", variant="A"),
    "nuwa reroute B": Routing(schedule="nuwa", action="reroute", variant="B"),
    "calibrated remove once": REMOVE_ONCE,
    "calibrated remove": REMOVE,
    "calibrated reroute": REROUTE,
    "calibrated reroute falling": REROUTE_FALLING,
}
CALIBRATED = tuple(name for name, method in METHODS.items() if isinstance(method, Kind))

# What is set against what, at the same budget: the difference first - second is reported.
COMPARISONS: tuple[tuple[str, str], ...] = (
    ("fastv reroute", "fastv remove"),
    ("pdrop reroute", "pdrop remove"),
    ("fastv accumulated", "fastv reroute"),
    ("fastv accumulated", "fastv remove"),
    ("pdrop accumulated", "pdrop reroute"),
    ("pdrop accumulated", "pdrop remove"),
    ("pdrop reroute from 3", "pdrop remove from 3"),
    ("pdrop reroute from 3", "pdrop reroute"),
    ("nuwa reroute A", "nuwa remove"),
    ("nuwa reroute B", "nuwa remove"),
    ("calibrated remove once", "fastv remove"),
    ("calibrated remove", "pdrop remove"),
    ("calibrated reroute", "fastv reroute"),
    ("calibrated reroute", "pdrop reroute"),
    ("calibrated reroute falling", "pdrop reroute"),
    ("calibrated reroute", "calibrated reroute falling"),
    ("calibrated reroute", "calibrated remove"),
    ("fastv remove", "random"),
    ("fastv reroute", DOWNSAMPLE),
    ("pdrop reroute", DOWNSAMPLE),
)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One server to ask.

    budget: wanted share of visual tokens, None for dense. average: visual tokens per decoder layer it has.
    grid: side of the image's grid of visual tokens. decision_layers, kept: tokens per stage, first stage included.
    note: how decision layers and counts came about. arguments: of the server, for routing.
    """

    method: str
    budget: float | None
    average: float
    grid: int
    decision_layers: tuple[int, ...] = ()
    kept: tuple[int, ...]
    note: str = ""
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique within a run, and fit to be a file's name."""
        words = self.method.split() + ([] if self.budget is None else [f"{100 * self.budget:g}"])
        return "-".join(words)

    def as_row(self) -> dict:
        """What is recorded of it, in JSON's types."""
        row = asdict(self)
        return row | {key: list(row[key]) for key in ("decision_layers", "kept", "arguments")}


def configurations(
    methods: Sequence[str], budgets: Sequence[float], shape: ModelShape
) -> list[Configuration]:
    """Those methods at those budgets (shares in (0, 1)); dense once."""
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"--only {unknown[0]!r} is unknown. Choose of: {', '.join(METHODS)}.")
    for budget in budgets:
        if not 0 < budget < 1:
            raise ValueError(
                f"--budgets {100 * budget:g} must lie between 0 and 100: it is a percentage of the "
                "image's visual tokens. Example: 33 22 11 5."
            )
    budgets = list(dict.fromkeys(budgets))
    return [found for name in dict.fromkeys(methods) for found in _of_method(name, budgets, shape)]


def _of_method(name: str, budgets: Sequence[float], shape: ModelShape) -> Iterator[Configuration]:
    if name == DENSE:
        yield _unrouted(DENSE, None, math.isqrt(shape.visual_tokens), "stock vLLM")
        return
    for budget in budgets:
        if name == DOWNSAMPLE:
            yield downsampled(budget, shape)
        elif name in CALIBRATED:
            yield calibrated(name, budget, shape)
        else:
            yield routed(name, budget, shape)


def _unrouted(name: str, budget: float | None, grid: int, note: str) -> Configuration:
    return Configuration(
        method=name, budget=budget, average=grid * grid, grid=grid, kept=(grid * grid,), note=note
    )


def downsampled(budget: float, shape: ModelShape) -> Configuration:
    """The square grid whose number of tokens is nearest to the budget; stock vLLM serves it."""
    wanted = budget * shape.visual_tokens
    sides = range(1, math.isqrt(shape.visual_tokens) + 1)
    grid = min(sides, key=lambda side: abs(side * side - wanted))
    return _unrouted(DOWNSAMPLE, budget, grid, f"image resized to {grid} by {grid} patches")


def calibrated(name: str, budget: float, shape: ModelShape) -> Configuration:
    """A schedule that `benchmarks.grounding.calibrate` has made for the served model."""
    kind = METHODS[name]
    assert isinstance(kind, Kind)
    path = kind.path(100 * budget)
    if not path.exists():
        raise ValueError(
            f"--budgets {100 * budget:g} has no schedule of {name!r} ({path.name} is not there). Leave one of both "
            "out, or add it to PERCENT in benchmarks/grounding/calibrate.py and run that."
        )
    found = CalibratedSchedule.read(path)
    assert shape.identity is not None, "calibrated schedules are served from a folder"
    found.check_model(path, shape.identity)
    schedule = found.options.resolve(shape.decoder_layers)
    return Configuration(
        method=name,
        budget=budget,
        average=schedule.average(shape.visual_tokens),
        grid=math.isqrt(shape.visual_tokens),
        decision_layers=schedule.layers,
        kept=tuple(schedule.kept_per_stage(shape.visual_tokens)),
        note=f"calibrated on {found.about['samples']['count']} questions of the validation split",
        arguments=tuple(server_flags(found.options)),
    )


@lru_cache
def routed(name: str, budget: float, shape: ModelShape) -> Configuration:
    """A routed method at the reachable average nearest to the budget.

    Decision layers are the published ones but for a method's own first layer, scaled to the depth. If the dense layers
    before the first decision alone exceed the budget, the first decision moves to layer 1; if one dense layer does, the
    lowest average is taken. A schedule whose first decision is the vision encoder's has no dense layers.
    """
    routing, depth, visual = METHODS[name], shape.decoder_layers, shape.visual_tokens
    assert isinstance(routing, Routing)
    published = routing.schedule_for_32
    wanted = budget * visual
    layers = scale_decision_layers(published.layers, depth)
    if starts_in_encoder(published) or _lowest(layers, depth, visual) <= wanted:
        options_for, note = _published_options(routing), "published decision layers, scaled"
        if routing.first_layer is not None:
            options_for = _moved_options(routing, layers, depth)
            note += f", but for the first, {layers[0]}"
        options, schedule = _nearest(options_for, max(1.0, wanted), shape)
    else:
        moved = scale_decision_layers((1, *published.layers[1:]), depth)
        dense = f"{layers[0]} dense layer{'s' * (layers[0] > 1)} of {depth}"
        if _lowest(moved, depth, visual) <= wanted:
            options, schedule = _nearest(_moved_options(routing, moved, depth), wanted, shape)
            note = f"first decision moved to layer 1: {dense} alone exceed {budget:.0%}"
        else:
            keep = (1.5 / visual,) * len(moved)
            options = RerouteOptions(layers=moved, keep=keep, action=routing.action)
            schedule = options.resolve(depth)
            note = (
                f"{budget:.0%} is not reachable: one dense layer of {depth} is {1 / depth:.1%}. Shown is the lowest "
                "reachable average: decision at layer 1, one token per layer after it"
            )
    return Configuration(
        method=name,
        budget=budget,
        average=schedule.average(visual),
        grid=math.isqrt(visual),
        decision_layers=schedule.layers,
        kept=tuple(schedule.kept_per_stage(visual)),
        note=note,
        arguments=(*server_flags(options), *routing.flags),
    )


def _lowest(layers: Sequence[int], depth: int, visual: int) -> float:
    """The lowest average with these decision layers: one token in every stage after a dense one."""
    return average_visual_tokens(depth, layers, [0.0] * len(layers), visual)


def _published_options(routing: Routing) -> OptionsFor:
    """average for the reference image -> options with the published decision layers."""
    return lambda average: RerouteOptions(
        schedule=routing.schedule, action=routing.action, variant=routing.variant, budget=average
    )


def _moved_options(routing: Routing, layers: tuple[int, ...], depth: int) -> OptionsFor:
    """average for the reference image -> options with these decision layers and the published shape."""
    published = _with_layers(routing.schedule_for_32, layers)
    return lambda average: RerouteOptions(
        layers=layers,
        keep=solve_keep_ratios(published, depth, layers, average),
        action=routing.action,
    )


def _nearest(
    options_for: OptionsFor, wanted: float, shape: ModelShape
) -> tuple[RerouteOptions, RoutingSchedule]:
    """Of the options near the wanted average, those whose average on this model's image is nearest to it."""
    per_token = REFERENCE_VISUAL_TOKENS / shape.visual_tokens
    found = []
    for step in range(-TOKENS_AROUND * STEPS_PER_TOKEN, TOKENS_AROUND * STEPS_PER_TOKEN + 1):
        average = per_token * (wanted + step / STEPS_PER_TOKEN)
        try:
            options = options_for(average)
            schedule = options.resolve(shape.decoder_layers)
        except ValueError:  # Outside what these layers reach for the reference image.
            continue
        distance = abs(schedule.average(shape.visual_tokens) - wanted)
        found.append((round(distance, 9), abs(step), options, schedule))
    if not found:
        raise ValueError(
            f"No ratios average {wanted:.1f} of {shape.visual_tokens} visual tokens on "
            f"{shape.decoder_layers} layers. Choose another of --budgets."
        )
    *_, options, schedule = min(found, key=lambda each: each[:2])
    return options, schedule


def server_flags(options: RerouteOptions) -> list[str]:
    """The options as `vllm serve` takes them."""
    words: list[str] = []
    for name, value in options.to_mapping().items():
        text = ",".join(map(repr, value)) if isinstance(value, tuple) else str(value)
        words += [f"--reroute-{name}", text]
    return words
