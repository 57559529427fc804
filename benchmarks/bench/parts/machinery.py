"""What routing costs where it saves nothing: keep ratios of about 1, text only, many KV groups."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks.bench import plot, targets
from benchmarks.bench.driving import REPEATS, Workload, drive
from benchmarks.bench.engines import STOCK, EngineSpec, chunked, column, engine_wave
from benchmarks.bench.progress import Progress
from benchmarks.bench.settings import BenchModel, Settings
from benchmarks.bench.spread import Spread, paired, shown
from benchmarks.bench.worker import Worker

TITLE = "Machinery"
PLOT = "machinery.svg"
TEXT_ROOM = 256
PUBLISHED_GROUPS = 5
"""Four decisions, as published schedules have: prefill's target is for these, and for none at all."""
SAVES = "pdrop reroute 192"
KEEP_ALL = "keep all, 2 groups"
READING = """\
"Keep all but one, n groups" defers one visual token at each of n - 1 decisions, so that scoring, choosing and bringing
back all run and nothing is saved; every stage is a KV cache group (pages of parked states, one more, are not counted).
"Keep all" has one decision that keeps everything: there is nothing to choose. All ratios are this engine's time over
stock's in the same round, below 1 is faster. *Text* is a batch of requests without an image. `pdrop reroute 192` is the
default schedule, for comparison: its prefill and decode steps do save. A decision scores all tokens present, about a
twelfth of a layer's arithmetic here, so prefill grows with the number of decisions by design; its bound is for up to
four of them."""


def waves(settings: Settings, progress: Progress) -> dict[str, Callable[[], dict]]:
    model = settings.wide()
    return waves_of(
        settings,
        model,
        [
            EngineSpec(name=KEEP_ALL, options={"layers": [1], "keep": [1.0]}),
            *saving_nothing(settings, model),
            EngineSpec(name=SAVES, options={"schedule": "pdrop", "tier": 192}),
        ],
        progress,
    )


def saving_nothing(settings: Settings, model: BenchModel) -> list[EngineSpec]:
    """Engines with more and more stages that defer one visual token each."""
    return [
        EngineSpec(
            name=f"keep all but one, {groups} groups",
            options=keep_nearly_all(groups, model.depth, model.visual),
        )
        for groups in settings.sizes.groups
    ]


def waves_of(
    settings: Settings, model: BenchModel, specs: list[EngineSpec], progress: Progress
) -> dict[str, Callable[[], dict]]:
    """Those engines beside stock, in as few waves as fit."""
    found: dict[str, Callable[[], dict]] = {}
    for number, wave in enumerate(chunked([EngineSpec(name=STOCK)], specs, settings.at_once)):
        found[f"groups-{number + 1}"] = partial(measure, settings, model, wave, progress)
    return found


def keep_nearly_all(groups: int, depth: int, num_visual: int) -> dict:
    """Reroute options with that many stages, two or more, which defer one visual token each."""
    decisions = groups - 1
    if decisions > depth - 1:
        raise ValueError(f"{groups} KV groups need more than {depth} decoder layers.")
    layers = [1 + i * (depth - 1) // decisions for i in range(decisions)]
    # Different ratios that all keep num_visual - 1.
    keep = [(num_visual - 1 + (i + 0.5) / decisions) / num_visual for i in range(decisions)]
    return {"layers": layers, "keep": keep}


def measure(
    settings: Settings, model: BenchModel, specs: list[EngineSpec], progress: Progress
) -> dict:
    """An image request and a batch of text requests, by every engine in turn."""
    sizes = settings.sizes
    image = Workload(answer_tokens=1 + sizes.decode_tokens)
    # Short enough for all of them to fit one dense image request's pool.
    text = Workload(
        images=0,
        requests=sizes.text_requests,
        answer_tokens=1 + sizes.decode_tokens,
        text=REPEATS // 2,
    )

    def ask(worker: Worker) -> dict:
        return {"image": worker.call(drive, image), "text": worker.call(drive, text)}

    room = model.visual + TEXT_ROOM
    return engine_wave(settings, model, specs, ask, progress, room=room)


def summarise(measured: Mapping[str, dict]) -> dict:
    rows = rows_of(measured)
    return {"rows": rows, "targets": list(_targets(rows))}


def rows_of(measured: Mapping[str, dict]) -> list[dict]:
    """One row for every engine, stock's once."""
    rows: list[dict] = []
    for wave in measured.values():
        stock = wave["engines"][STOCK]
        for engine, about in wave["engines"].items():
            if engine == STOCK and rows:
                continue
            rows.append({"engine": engine, "groups": about["groups"], **_against(stock, about)})
    return rows


def _against(stock: Mapping, about: Mapping) -> dict:
    def ratio(*keys: str) -> dict:
        return Spread.of(paired(column(about, *keys), column(stock, *keys))).as_row()

    return {
        "first_token_s": Spread.of(column(about, "image", "first_token_s")).as_row(),
        "decode_s": Spread.of(column(about, "image", "decode_s")).as_row(),
        "prefill": ratio("image", "first_token_s"),
        "decode": ratio("image", "decode_s"),
        "text": ratio("text", "total_s"),
        "text_decode": ratio("text", "decode_s"),
    }


def _targets(rows: list[dict]) -> Iterator[dict]:
    for row in rows:
        if row["engine"] == STOCK:
            continue
        if row["engine"] != SAVES and row["groups"] <= PUBLISHED_GROUPS:
            yield targets.at_least(
                f"prefill speed, {row['engine']}, of stock",
                1 / row["prefill"]["median"],
                targets.MACHINERY_PREFILL,
            )
        if row["groups"] <= targets.MACHINERY_GROUPS:
            yield targets.at_most(
                f"decode step, {row['engine']}, over stock",
                row["decode"]["median"],
                targets.MACHINERY_DECODE,
            )
        yield targets.at_least(
            f"text-only throughput, {row['engine']}, of stock",
            1 / row["text"]["median"],
            targets.TEXT_ONLY,
        )


def markdown(found: dict) -> Iterator[str]:
    yield f"![Decode step against KV groups]({PLOT})\n"
    yield READING + "\n"
    yield from table(found["rows"])


def table(rows: list[dict]) -> Iterator[str]:
    yield (
        "| engine | KV groups | first token, ms | decode step, ms | prefill / stock | decode / stock "
        "| text / stock | text decode / stock |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        ratios = " | ".join(
            shown(row[key], digits=3) for key in ("prefill", "decode", "text", "text_decode")
        )
        yield (
            f"| {row['engine']} | {row['groups'] or ''} | {shown(row['first_token_s'], 1000, 0)} | "
            f"{shown(row['decode_s'], 1000, 1)} | {ratios} |"
        )


def draw(found: dict, folder: Path) -> list[Path]:
    rows = [row for row in found["rows"] if row["engine"] not in (STOCK, SAVES, KEEP_ALL)]
    if not rows:
        return []
    groups = {
        label: [(row["groups"], row[key]) for row in rows]
        for label, key in (
            ("image request", "decode"),
            ("text requests", "text_decode"),
            ("prefill", "prefill"),
        )
    }
    ends = [min(row["groups"] for row in rows), max(row["groups"] for row in rows)]
    bound = targets.MACHINERY_DECODE
    return [
        plot.lines(
            folder / PLOT,
            groups,
            xlabel="KV cache groups",
            ylabel="time / stock vLLM",
            bounds={f"decode step's bound, {bound}": [(end, bound) for end in ends]},
        )
    ]
