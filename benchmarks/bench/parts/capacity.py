"""How many image requests one fixed KV pool holds, against how many could fit, and what that does."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks.bench import device, targets
from benchmarks.bench.driving import Workload, fill_pool
from benchmarks.bench.engines import STOCK, EngineSpec, started, take_turns
from benchmarks.bench.progress import Progress
from benchmarks.bench.settings import Settings
from benchmarks.bench.spread import Spread, paired, shown

TITLE = "Capacity"
TEXT_ROOM = 256
ANSWER_TOKENS = 32
CONFIGURATIONS = {
    STOCK: None,
    "pdrop reroute 192": {"schedule": "pdrop", "tier": 192},
    "pdrop reroute 64": {"schedule": "pdrop", "tier": 64},
}
READING = """\
All engines have the same KV pool and get the same requests at once, more than fit; each has one image and its answer is
{answer} tokens. *In flight* is the most requests that held their whole prompt while others waited; *ideal* is how
many of the lengths they had at that moment fit the pool token by token, without blocks. Preemptions are of all
requests of one round. Blocks hold {block} tokens here: the last block of every layer is on average half empty, which
is most of what separates the two."""


def waves(settings: Settings, progress: Progress) -> dict[str, Callable[[], dict]]:
    return {"pool": partial(_measure, settings, progress)}


def _measure(settings: Settings, progress: Progress) -> dict:
    model, sizes = settings.narrow(), settings.sizes
    room = model.visual + TEXT_ROOM
    work = Workload(requests=sizes.capacity_requests, answer_tokens=ANSWER_TOKENS)
    pool = int(sizes.pool_requests * room * model.kv_bytes * model.depth)
    changes = {
        "kv_cache_memory_bytes": pool,
        "max_num_seqs": sizes.capacity_requests,
        "max_num_batched_tokens": max(2048, 4 * room),
    }
    specs = [
        EngineSpec(name=name, options=options, changes=changes)
        for name, options in CONFIGURATIONS.items()
    ]
    abouts = {spec.name: spec.about(model) for spec in specs}
    with started(settings, model, specs, room, 1, progress) as workers:
        samples = take_turns(
            list(workers),
            lambda name: workers[name].call(
                fill_pool, work, abouts[name]["kept"], model.kv_bytes, pool
            ),
            settings.rounds,
            progress,
        )
    return {
        "pool_bytes": pool,
        "requests": sizes.capacity_requests,
        "engines": {name: abouts[name] | {"samples": samples[name]} for name in abouts},
    }


def summarise(measured: Mapping[str, dict]) -> dict:
    if "pool" not in measured:
        return {"rows": [], "targets": []}
    wave = measured["pool"]
    stock = [sample["total_s"] for sample in wave["engines"][STOCK]["samples"]]
    rows = []
    for engine, about in wave["engines"].items():
        samples = about["samples"]
        times = [sample["total_s"] for sample in samples]
        rows.append(
            {
                "engine": engine,
                "average": about["average"],
                "in_flight": Spread.of(s["in_flight"] for s in samples).as_row(),
                "ideal": Spread.of(s["ideal"] for s in samples).as_row(),
                "share": Spread.of(
                    s["in_flight"] / s["ideal"] if s["ideal"] else 0.0 for s in samples
                ).as_row(),
                "preemptions": Spread.of(s["preemptions"] for s in samples).as_row(),
                "requests_per_s": Spread.of(wave["requests"] / t for t in times).as_row(),
                "speed_up": Spread.of(paired(stock, times)).as_row(),
            }
        )
    return {
        "pool_bytes": wave["pool_bytes"],
        "requests": wave["requests"],
        "rows": rows,
        "targets": [
            targets.at_least(
                f"capacity, {row['engine']}: share of the ideal number",
                row["share"]["median"],
                targets.CAPACITY,
            )
            for row in rows
            if row["engine"] != STOCK
        ],
    }


def markdown(found: dict) -> Iterator[str]:
    if not found["rows"]:
        return
    yield READING.format(answer=ANSWER_TOKENS, block=device.BLOCK_SIZE) + "\n"
    yield f"Pool: {found['pool_bytes'] / 2**20:,.0f} MiB; {found['requests']} requests.\n"
    yield (
        "| engine | visual tokens per layer | in flight | ideal | share | preemptions | requests/s "
        "| over stock |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in found["rows"]:
        yield (
            f"| {row['engine']} | {row['average']:.1f} | {shown(row['in_flight'], digits=0)} | "
            f"{shown(row['ideal'], digits=0)} | {shown(row['share'])} | "
            f"{shown(row['preemptions'], digits=0)} | {shown(row['requests_per_s'])} | "
            f"{shown(row['speed_up'])} |"
        )


def draw(found: dict, folder: Path) -> list[Path]:
    """Nothing: four rows are a table."""
    return []
