"""Prompts that begin alike, and prompts longer than a step: against stock vLLM with its prefix cache."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.bench import targets
from benchmarks.bench.conversations import TRAFFIC, Traffic, beside_long_prompt, converse
from benchmarks.bench.engines import STOCK, EngineSpec, column, engine_wave, seeded
from benchmarks.bench.progress import Progress
from benchmarks.bench.settings import Settings
from benchmarks.bench.spread import Spread, paired, shown

TITLE = "Reuse"
CONFIGURATIONS = {
    STOCK: None,
    "pdrop reroute 192": {"schedule": "pdrop", "tier": 192},
    "pdrop reroute 64": {"schedule": "pdrop", "tier": 64},
}
STEP_TOKENS = 2048
OTHERS = 4
READING = """\
All engines have vLLM's prefix cache and processor cache on, as users run them. Times to first token over stock's in the
same round, below 1 is faster. A turn of a chat is the conversation so far, with the engine's own answers of 32 tokens,
and a new question. Answers of routed engines differ from stock's, pictures and words do not. *Cached* is the share of
prompt tokens read from the cache. *Layer passes* is arithmetic, not measured: how many times a token runs through a
decoder layer, over stock's: every question ranks the picture anew, so text behind it and what is kept of it run the
later stages again."""
LONG_READING = """\
A prompt of {visual} visual tokens arrives while {others} requests decode; a step holds {step} tokens. Steps are those
from its arrival to its first token: what the others wait between two of their tokens."""


def waves(settings: Settings, progress: Progress) -> dict[str, Callable[[], dict]]:
    found: dict[str, Callable[[], dict]] = {
        traffic.kind: partial(_measure, settings, traffic, progress) for traffic in TRAFFIC
    }
    found["long"] = partial(_measure_long, settings, progress)
    return found


def _specs(**changes: object) -> list[EngineSpec]:
    changes = {"enable_prefix_caching": True, "mm_processor_cache_gb": 4, **changes}
    return [
        EngineSpec(name=name, options=options, changes=changes)
        for name, options in CONFIGURATIONS.items()
    ]


def _measure(settings: Settings, traffic: Traffic, progress: Progress) -> dict:
    model = settings.reuse()
    room = min(model.max_positions, model.visual + 1500)
    ask = seeded(lambda worker, number: worker.call(converse, traffic, number))
    return engine_wave(settings, model, _specs(), ask, progress, room=room, requests=3)


def _measure_long(settings: Settings, progress: Progress) -> dict:
    model, images = settings.reuse(), settings.sizes.long_images
    specs = _specs(
        max_num_batched_tokens=STEP_TOKENS,
        limit_mm_per_prompt={"image": images},
    )
    ask = seeded(lambda worker, number: worker.call(beside_long_prompt, images, OTHERS, number))
    room = images * model.visual + 512
    wave = engine_wave(settings, model, specs, ask, progress, room=room, requests=2)
    for about in wave["engines"].values():
        for sample in about["samples"]:
            steps = sample.pop("steps_s")
            sample |= {
                "p50_s": float(np.quantile(steps, 0.5)),
                "p99_s": float(np.quantile(steps, 0.99)),
            }
            sample["steps"] = len(steps)
    return wave | {"visual": images * model.visual}


def summarise(measured: Mapping[str, dict]) -> dict:
    rows, long_rows = [], []
    for traffic in TRAFFIC:
        if traffic.kind in measured:
            rows += _traffic_rows(traffic, measured[traffic.kind])
    if "long" in measured:
        long_rows = _long_rows(measured["long"])
    return {
        "rows": rows,
        "long": long_rows,
        "visual": measured["long"]["visual"] if "long" in measured else None,
        "targets": [*_traffic_targets(rows), *_long_targets(long_rows)],
    }


def _traffic_rows(traffic: Traffic, wave: Mapping) -> list[dict]:
    stock = column(wave["engines"][STOCK], "first_token_s")
    dense_passes = layer_passes(wave["engines"][STOCK], wave["visual"])
    rows = []
    for engine, about in wave["engines"].items():
        own = column(about, "first_token_s")
        cached = [s["cached"] / s["prompt_tokens"] for s in about["samples"]]
        rows.append(
            {
                "kind": traffic.kind,
                "traffic": traffic.name,
                "engine": engine,
                "seconds": Spread.of(own).as_row(),
                "over_stock": Spread.of(paired(own, stock)).as_row(),
                "cached": Spread.of(cached).as_row(),
                "layer_passes": layer_passes(about, wave["visual"]) / dense_passes,
            }
        )
    return rows


def layer_passes(about: Mapping, visual: int) -> float:
    """Token times layer of an engine's requests, mean over rounds; see READING.

    visual: tokens of the one picture every request has.
    """
    (first, _), *later = about["kept"]
    passes = 0
    for sample in about["samples"]:
        passes += first * (sample["prompt_tokens"] - sample["cached"])
        for layers, kept in later:
            anew = sample["prompt_tokens"] - sample["cached_text"]
            passes += layers * (anew - len(sample["each_s"]) * (visual - kept))
    return passes / len(about["samples"])


def _long_rows(wave: Mapping) -> list[dict]:
    stock = wave["engines"][STOCK]
    return [
        {
            "engine": engine,
            **{
                f"{key}_{what}": Spread.of(values).as_row()
                for key in ("first_token_s", "p50_s", "p99_s")
                for what, values in (
                    ("own", column(about, key)),
                    ("over_stock", paired(column(about, key), column(stock, key))),
                )
            },
            "steps": Spread.of(column(about, "steps")).as_row(),
        }
        for engine, about in wave["engines"].items()
    ]


def _traffic_targets(rows: list[dict]) -> Iterator[dict]:
    for row in rows:
        bound = targets.REUSE.get((row["kind"], row["engine"]))
        if bound is not None:
            yield targets.at_most(
                f"{row['traffic']}, {row['engine']}, over stock", row["over_stock"]["median"], bound
            )


def _long_targets(rows: list[dict]) -> Iterator[dict]:
    for row in rows:
        if row["engine"] != STOCK:
            yield targets.at_most(
                f"steps beside a long prompt, p99, {row['engine']}, over stock",
                row["p99_s_over_stock"]["median"],
                targets.BESIDE_LONG_PROMPT,
            )


def markdown(found: dict) -> Iterator[str]:
    if found["rows"]:
        yield READING + "\n"
        yield "| traffic | engine | first token, ms | over stock | layer passes | cached |"
        yield "|---|---|---|---|---|---|"
        for row in found["rows"]:
            yield (
                f"| {row['traffic']} | {row['engine']} | {shown(row['seconds'], 1000, 0)} | "
                f"{shown(row['over_stock'])} | {row['layer_passes']:.2f} | {shown(row['cached'])} |"
            )
    if found["long"]:
        yield (
            "\n"
            + LONG_READING.format(visual=found["visual"], others=OTHERS, step=STEP_TOKENS)
            + "\n"
        )
        yield "| engine | first token, ms | over stock | step p50, over stock | step p99, ms | over stock |"
        yield "|---|---|---|---|---|---|"
        for row in found["long"]:
            yield (
                f"| {row['engine']} | {shown(row['first_token_s_own'], 1000, 0)} | "
                f"{shown(row['first_token_s_over_stock'])} | {shown(row['p50_s_over_stock'])} | "
                f"{shown(row['p99_s_own'], 1000, 0)} | {shown(row['p99_s_over_stock'])} |"
            )


def draw(found: dict, folder: Path) -> list[Path]:
    """Nothing: the rows are tables."""
    return []
