"""How gains grow with images per prompt, batch and depth, and whether the cost model foresees it."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks.bench import plot
from benchmarks.bench.driving import Workload, drive
from benchmarks.bench.engines import STOCK, EngineSpec, column, engine_wave
from benchmarks.bench.progress import Progress
from benchmarks.bench.settings import BenchModel, Settings
from benchmarks.bench.spread import Spread, paired, shown
from benchmarks.bench.worker import Worker
from vllm_reroute.schedule import RerouteOptions
from vllm_reroute.schedule.cost_model import DecoderShape, RequestCost, vision_shape

TITLE = "Scaling"
TEXT_ROOM = 256
CONFIGURATIONS = {
    "pdrop reroute 192": {"schedule": "pdrop", "tier": 192},
}
AXES = {"images": "images per prompt", "batch": "requests at once", "depth": "decoder layers"}
READING = """\
Seconds until all first tokens are there, and per decode step, against stock in the same round. *Foreseen* is the cost
model's ratio of FLOPs (`vllm-reroute plan`): it knows no fixed times, so it is too high where the model is small. A
prompt with several images grows faster than its tokens, since attention is quadratic, and routing saves more. Depths
below the model's are engines with random weights."""


def waves(settings: Settings, progress: Progress) -> dict[str, Callable[[], dict]]:
    model = settings.narrow()
    found: dict[str, Callable[[], dict]] = {
        "images-and-batch": partial(_images_and_batch, settings, model, progress)
    }
    for share in settings.sizes.depths:
        depth = round(share * model.depth)
        found[f"depth-{depth}"] = partial(_depth, settings, model, depth, progress)
    return found


def _specs(depth: int | None = None) -> list[EngineSpec]:
    return [
        EngineSpec(name=STOCK, depth=depth),
        *(EngineSpec(name=n, options=o, depth=depth) for n, o in CONFIGURATIONS.items()),
    ]


def _images_and_batch(settings: Settings, model: BenchModel, progress: Progress) -> dict:
    sizes = settings.sizes
    answer = 1 + sizes.decode_tokens // 2
    images = [n for n in sizes.images if n * model.visual + TEXT_ROOM <= model.max_positions]
    points = {
        **{f"images {n}": Workload(images=n, answer_tokens=answer) for n in images},
        **{f"batch {n}": Workload(requests=n, answer_tokens=answer) for n in sizes.batches},
    }
    most = max(sizes.batches)
    one = model.visual + TEXT_ROOM
    room = max(images) * model.visual + TEXT_ROOM
    changes = {
        "limit_mm_per_prompt": {"image": max(images)},
        "max_num_batched_tokens": max(2048, room, most * one),
        "max_num_seqs": most,
        "kv_cache_memory_bytes": 2 * max(room, most * one) * model.kv_bytes * model.depth,
    }
    specs = [EngineSpec(name=spec.name, options=spec.options, changes=changes) for spec in _specs()]

    def ask(worker: Worker) -> dict:
        return {name: worker.call(drive, work) for name, work in points.items()}

    wave = engine_wave(settings, model, specs, ask, progress, room=room)
    return _with_foreseen(wave, model, points)


def _depth(settings: Settings, model: BenchModel, depth: int, progress: Progress) -> dict:
    work = Workload(answer_tokens=1 + settings.sizes.decode_tokens // 2)
    name = f"depth {depth}"
    wave = engine_wave(
        settings,
        model,
        _specs(depth),
        lambda worker: {name: worker.call(drive, work)},
        progress,
        room=model.visual + TEXT_ROOM,
    )
    return _with_foreseen(wave, model, {name: work}, depth)


def _with_foreseen(
    wave: dict, model: BenchModel, points: Mapping[str, Workload], depth: int | None = None
) -> dict:
    """Adds the cost model's prefill ratio of every point to every routed engine."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.folder)
    config.get_text_config().num_hidden_layers = depth or model.depth
    for engine in wave["engines"].values():
        engine["foreseen"] = {}
        if engine["options"] is None:
            continue
        for name, work in points.items():
            prompt = engine["samples"][0][name]["prompt_tokens"]
            cost = RequestCost(
                decoder=DecoderShape.of(config.get_text_config()),
                vision=vision_shape(config, model.visual),
                schedule=RerouteOptions.from_mapping(engine["options"]).resolve(engine["depth"]),
                image_sizes=(model.visual,) * work.images,
                num_text=prompt - work.images * model.visual,
            )
            engine["foreseen"][name] = cost.dense_flops / cost.routed_flops
    return wave


def summarise(measured: Mapping[str, dict]) -> dict:
    rows = []
    for wave in measured.values():
        stock = wave["engines"][STOCK]
        for engine, about in wave["engines"].items():
            for point in about["samples"][0]:
                axis, _, value = point.partition(" ")
                times = column(about, point, "first_token_s")
                steps = column(about, point, "decode_s")
                rows.append(
                    {
                        "axis": axis,
                        "value": int(value),
                        "engine": engine,
                        "first_token_s": Spread.of(times).as_row(),
                        "decode_s": Spread.of(steps).as_row(),
                        "speed_up": Spread.of(
                            paired(column(stock, point, "first_token_s"), times)
                        ).as_row(),
                        "decode": Spread.of(
                            paired(steps, column(stock, point, "decode_s"))
                        ).as_row(),
                        "foreseen": about["foreseen"].get(point),
                    }
                )
    order = list(AXES)
    rows.sort(key=lambda row: (order.index(row["axis"]), row["value"]))
    return {"rows": rows, "targets": []}


def markdown(found: dict) -> Iterator[str]:
    if not found["rows"]:
        return
    yield READING + "\n"
    for axis, label in AXES.items():
        rows = [row for row in found["rows"] if row["axis"] == axis]
        if not rows:
            continue
        yield f"\n![Speed-up against {label}]({_plot(axis)})\n"
        yield (
            f"| {label} | engine | first tokens, ms | speed-up | foreseen | decode step, ms "
            "| decode / stock |"
        )
        yield "|---|---|---|---|---|---|---|"
        for row in rows:
            foreseen = f"{row['foreseen']:.2f}" if row["foreseen"] else ""
            yield (
                f"| {row['value']} | {row['engine']} | {shown(row['first_token_s'], 1000, 0)} | "
                f"{shown(row['speed_up'])} | {foreseen} | {shown(row['decode_s'], 1000, 1)} | "
                f"{shown(row['decode'])} |"
            )


def _plot(axis: str) -> str:
    return f"scaling-{axis}.svg"


def draw(found: dict, folder: Path) -> list[Path]:
    paths = []
    for axis, label in AXES.items():
        rows = [row for row in found["rows"] if row["axis"] == axis and row["engine"] != STOCK]
        if not rows:
            continue
        groups: dict[str, list] = {}
        bounds: dict[str, list] = {}
        for row in rows:
            groups.setdefault(row["engine"], []).append((row["value"], row["speed_up"]))
            bounds.setdefault(f"{row['engine']}, foreseen", []).append(
                (row["value"], row["foreseen"])
            )
        paths.append(
            plot.lines(
                folder / _plot(axis), groups, xlabel=label, ylabel="prefill speed-up over stock",
                bounds=bounds, log_x=True,
            )
        )  # fmt: skip
    return paths
