"""Time to the first token of one image, against the visual tokens an average layer runs."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bench import plot, targets
from benchmarks.bench.driving import Workload, drive
from benchmarks.bench.engines import (
    SHALLOW,
    STOCK,
    EngineSpec,
    chunked,
    column,
    engine_wave,
)
from benchmarks.bench.limits import StockParts
from benchmarks.bench.progress import Progress
from benchmarks.bench.settings import BenchModel, Settings
from benchmarks.bench.spread import Spread, paired, shown

TITLE = "Prefill"
PLOT = "prefill.svg"
TEXT_ROOM = 256
CURVE_POINTS = 48
READING = """\
Time to the first token of one image, image processing and vision tower included; speed-up is stock's time over
this one's in the same round. *Products* is the bare ratio of layer·token products, text included. The *limit* also
counts what routing cannot save: two stock engines of the same widths and different depths tell the time per layer
from the fixed time, round by round, and limit = dense / (fixed + (dense - fixed) · products routed / products dense).
*Reached* is speed-up over limit in the same round. Averages of remove and reroute are equal within a tier: `fastv` as
published (its two actions average alike), `pdrop` solved for the tier with `--reroute-budget`, `nuwa` as published,
in a wave of its own at one tier."""


def waves(settings: Settings, progress: Progress) -> dict[str, Callable[[], dict]]:
    model = settings.wide()
    base = [
        EngineSpec(name=STOCK),
        EngineSpec(name=SHALLOW, depth=settings.sizes.shallow_depth),
    ]
    found: dict[str, Callable[[], dict]] = {}
    plans = {str(tier): _of_tier(tier, model) for tier in settings.sizes.tiers}
    plans["nuwa"] = _pair("nuwa", model, settings.sizes.nuwa_tier, tier=settings.sizes.nuwa_tier)
    for name, specs in plans.items():
        waves_of_plan = chunked(base, specs, settings.at_once) if specs else []
        for number, wave in enumerate(waves_of_plan):
            key = f"{name}-{number + 1}" if number else name
            found[key] = partial(_measure, settings, model, wave, progress)
    compiled = _compiled(settings.sizes.compiled_depth)
    found["compiled"] = partial(_measure, settings, model, compiled, progress)
    return found


def _of_tier(tier: int, model: BenchModel) -> list[EngineSpec]:
    """Remove and reroute of both schedules, in pairs of equal averages."""
    return [
        *_pair("fastv", model, tier, tier=tier),
        *_pair("pdrop", model, tier, budget=float(tier)),
    ]


def _pair(schedule: str, model: BenchModel, label: int, **how: Any) -> list[EngineSpec]:
    specs = [
        EngineSpec(
            name=f"{schedule} {action} {label}",
            options={"schedule": schedule, "action": action, **how},
        )
        for action in ("remove", "reroute")
    ]
    return [spec for spec in specs if _reachable(spec, model)]


def _reachable(spec: EngineSpec, model: BenchModel) -> bool:
    """A shallow model's dense layers may cost more than a low budget."""
    try:
        spec.schedule(model)
    except ValueError:
        return False
    return True


def _compiled(depth: int) -> list[EngineSpec]:
    specs = []
    for name, options in ((STOCK, None), ("pdrop reroute 192", {"schedule": "pdrop", "tier": 192})):
        for compiled in (False, True):
            how = "compiled" if compiled else "eager"
            specs.append(
                EngineSpec(name=f"{name}, {how}", options=options, depth=depth, compiled=compiled)
            )
    return specs


def _measure(
    settings: Settings, model: BenchModel, specs: list[EngineSpec], progress: Progress
) -> dict:
    work = Workload(answer_tokens=1)
    return engine_wave(
        settings,
        model,
        specs,
        lambda worker: worker.call(drive, work),
        progress,
        room=model.visual + TEXT_ROOM,
    )


def summarise(measured: Mapping[str, dict]) -> dict:
    rows, compiled = [], None
    for name, wave in measured.items():
        if name == "compiled":
            compiled = _compiled_rows(wave)
        else:
            rows += _rows(name, wave)
    return {
        "rows": rows,
        "fixed_s": _fixed(measured),
        "limit_curve": _limit_curve(measured),
        "compiled": compiled,
        "targets": [*_limit_targets(rows), *_pair_targets(rows), *_compiled_targets(compiled)],
    }


def _parts(wave: Mapping) -> list[StockParts]:
    stock, shallow = (wave["engines"][name] for name in (STOCK, SHALLOW))
    return [
        StockParts(
            dense_s=dense, depth=stock["depth"], shallow_s=short, shallow_depth=shallow["depth"]
        )
        for dense, short in zip(
            column(stock, "first_token_s"), column(shallow, "first_token_s"), strict=True
        )
    ]


def _fixed(measured: Mapping[str, dict]) -> dict | None:
    found = [
        part.fixed_s for name, w in measured.items() if name != "compiled" for part in _parts(w)
    ]
    return Spread.of(found).as_row() if found else None


def _limit_curve(measured: Mapping[str, dict]) -> list[list[float]]:
    """(visual tokens per layer, median limit), over all rounds, from few tokens to all."""
    waves = [wave for name, wave in measured.items() if name != "compiled"]
    if not waves:
        return []
    visual = waves[0]["visual"]
    text = _text_tokens(waves[0])
    parts = [part for wave in waves for part in _parts(wave)]
    averages = [visual * (step + 1) / CURVE_POINTS for step in range(CURVE_POINTS)]
    return [
        [
            average,
            Spread.of(
                part.speed_up_limit((text + average) / (text + visual)) for part in parts
            ).median,
        ]
        for average in averages
    ]


def _text_tokens(wave: Mapping) -> int:
    """Of the prompt, the same in every engine."""
    return wave["engines"][STOCK]["samples"][0]["prompt_tokens"] - wave["visual"]


def _rows(name: str, wave: Mapping) -> list[dict]:
    parts = _parts(wave)
    dense = [part.dense_s for part in parts]
    rows = []
    for engine, about in wave["engines"].items():
        if engine == SHALLOW:
            continue
        times = column(about, "first_token_s")
        text = _text_tokens(wave)
        ratio = (text + about["average"]) / (text + wave["visual"])
        limits = [part.speed_up_limit(ratio) for part in parts]
        speed_ups = paired(dense, times)
        rows.append(
            {
                "wave": name,
                "engine": engine,
                "average": about["average"],
                # Tiers are stated for 576 tokens.
                "tier": 576 * about["average"] / wave["visual"],
                "schedule": (about["options"] or {}).get("schedule"),
                "action": (about["options"] or {}).get("action"),
                "seconds": Spread.of(times).as_row(),
                "speed_up": Spread.of(speed_ups).as_row(),
                "products": 1 / ratio,
                "limit": Spread.of(limits).as_row(),
                "reached": Spread.of(paired(speed_ups, limits)).as_row(),
                "rounds_s": times,
            }
        )
    return rows


def _limit_targets(rows: list[dict]) -> Iterator[dict]:
    for row in rows:
        if row["action"] is None:
            continue
        tier = min(targets.PREFILL_SHARE, key=lambda tier: abs(tier - row["tier"]))
        yield targets.at_least(
            f"prefill, {row['engine']}: share of the limit",
            row["reached"]["median"],
            targets.PREFILL_SHARE[tier],
        )


def _pair_targets(rows: list[dict]) -> Iterator[dict]:
    """Reroute against remove, where both were in one wave and their averages differ by under a token."""
    for row in rows:
        twins = [
            other
            for other in rows
            if (other["wave"], other["schedule"]) == (row["wave"], row["schedule"])
            and (other["action"], row["action"]) == ("remove", "reroute")
            and abs(other["average"] - row["average"]) < 1
        ]
        for twin in twins:
            ratio = Spread.of(paired(row["rounds_s"], twin["rounds_s"])).median
            yield targets.at_most(
                f"prefill, {row['engine']} over remove (averages {row['average']:.1f}, "
                f"{twin['average']:.1f})",
                ratio,
                targets.REROUTE_OVER_REMOVE,
            )


def _compiled_rows(wave: Mapping) -> list[dict]:
    """speed_up: over stock run the same way. over_eager: over the same engine, eager."""
    times = {name: column(about, "first_token_s") for name, about in wave["engines"].items()}
    rows = []
    for name, own in times.items():
        what, _, how = name.rpartition(", ")
        rows.append(
            {
                "engine": name,
                "depth": wave["engines"][name]["depth"],
                "seconds": Spread.of(own).as_row(),
                "speed_up": Spread.of(paired(times[f"{STOCK}, {how}"], own)).as_row(),
                "over_eager": Spread.of(paired(times[f"{what}, eager"], own)).as_row(),
                "routed": what != STOCK,
                "compiled": how == "compiled",
            }
        )
    return rows


def _compiled_targets(rows: list[dict] | None) -> Iterator[dict]:
    for row in rows or ():
        if row["routed"] and row["compiled"]:
            yield targets.at_least(
                f"prefill speed, {row['engine']}, of eager",
                row["over_eager"]["median"],
                targets.COMPILED_OVER_EAGER,
            )


def markdown(found: dict) -> Iterator[str]:
    if found["rows"]:
        yield f"![Prefill speed-up]({PLOT})\n"
        yield READING + "\n"
        fixed = found["fixed_s"]
        yield f"Fixed time of a stock request: {shown(fixed, 1000, 0)} ms.\n"
        yield (
            "| wave | engine | visual tokens per layer | first token, ms | speed-up | products | limit "
            "| reached |"
        )
        yield "|---|---|---|---|---|---|---|---|"
        for row in found["rows"]:
            yield (
                f"| {row['wave']} | {row['engine']} | {row['average']:.1f} | "
                f"{shown(row['seconds'], 1000, 0)} | {shown(row['speed_up'])} | {row['products']:.2f} | "
                f"{shown(row['limit'])} | {shown(row['reached'])} |"
            )
    if found["compiled"]:
        depth = found["compiled"][0]["depth"]
        yield f"\nEager and compiled (`torch.compile`), in a wave of their own, with {depth} layers:\n"
        yield "| engine | first token, ms | over stock run the same way | over itself, eager |"
        yield "|---|---|---|---|"
        for row in found["compiled"]:
            yield (
                f"| {row['engine']} | {shown(row['seconds'], 1000, 0)} | {shown(row['speed_up'])} | "
                f"{shown(row['over_eager'])} |"
            )


def draw(found: dict, folder: Path) -> list[Path]:
    if not found["rows"]:
        return []
    groups: dict[str, list[tuple[float, dict]]] = {}
    for row in found["rows"]:
        if row["action"] is None and STOCK in groups:
            continue
        label = f"{row['schedule']} {row['action']}" if row["action"] else STOCK
        groups.setdefault(label, []).append((row["average"], row["speed_up"]))
    return [
        plot.lines(
            folder / PLOT,
            groups,
            xlabel="visual tokens per decoder layer, average",
            ylabel="speed-up over stock vLLM",
            bounds={"theoretical limit": found["limit_curve"]},
        )
    ]
