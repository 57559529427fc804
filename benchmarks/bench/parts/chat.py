"""Conversations with each history, against stock vLLM with its prefix cache: one by one and many at once."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path

from benchmarks.bench import plot, targets
from benchmarks.bench.conversations import Traffic, converse, together
from benchmarks.bench.device import BLOCK_SIZE
from benchmarks.bench.engines import STOCK, EngineSpec, column, engine_wave, seeded
from benchmarks.bench.progress import Progress
from benchmarks.bench.settings import Settings
from benchmarks.bench.spread import Spread, paired, shown

TITLE = "Conversations"
PLOT = "chat.svg"
CONFIGURATIONS = {
    STOCK: None,
    "192, rerank": {"schedule": "pdrop", "tier": 192},
    "192, keep": {"schedule": "pdrop", "tier": 192, "history": "keep"},
    "192, recall": {"schedule": "pdrop", "tier": 192, "history": "recall"},
    "64, rerank": {"schedule": "pdrop", "tier": 64},
    "64, keep": {"schedule": "pdrop", "tier": 64, "history": "keep"},
    "64, recall": {"schedule": "pdrop", "tier": 64, "history": "recall"},
}
TURNS = Traffic(kind="turns", name="turns about one picture", turns=8, answer_tokens=16)
PICTURES = Traffic(
    kind="new", name="six turns, a new picture every third", turns=6, picture_every=3,
    answer_tokens=16,
)  # fmt: skip
# Where `recall` is measured, too. Without later turns it does what `keep` does.
RECALLED = (TURNS, PICTURES)
ALONE = (
    TURNS,
    PICTURES,
    Traffic(kind="questions", name="eight questions about one picture", questions=8),
    Traffic(kind="text-800", name="two pictures behind 800 tokens of text", system=800, pictures=2),
    Traffic(
        kind="text-2000", name="two pictures behind 2,000 tokens of text", system=2000, pictures=2
    ),
)  # fmt: skip
MANY = Traffic(kind="many", name="conversations of three turns", turns=3, answer_tokens=8)
STEP_TOKENS = 4096
READING = """\
`pdrop` with reroute; *rerank*, *keep* and *recall* are values of `--reroute-history`; *recall* is measured where one
conversation has later turns. All engines have vLLM's prefix cache and processor cache on, as users run them. Sums of
times to first token over stock's in the same round, below 1 is faster. A turn is the conversation so far, with the
engine's own answers, and a new question."""
HELD = """\
K/V held by the request of a conversation's last turn while it is answered, over stock's: {rows}."""


def waves(settings: Settings, progress: Progress) -> dict[str, Callable[[], dict]]:
    found: dict[str, Callable[[], dict]] = {
        t.kind: partial(_measure_alone, settings, t, progress) for t in ALONE
    }
    for number in settings.sizes.conversations:
        found[f"many-{number}"] = partial(_measure_many, settings, number, progress)
    return found


def _specs(*, recalls: bool = False, **changes: object) -> list[EngineSpec]:
    changes = {
        "enable_prefix_caching": True,
        "mm_processor_cache_gb": 4,
        "max_num_batched_tokens": STEP_TOKENS,
        **changes,
    }
    return [
        EngineSpec(name=name, options=options, changes=changes)
        for name, options in CONFIGURATIONS.items()
        if recalls or not options or options.get("history") != "recall"
    ]


def _measure_alone(settings: Settings, traffic: Traffic, progress: Progress) -> dict:
    model = settings.reuse()
    pictures = -(-traffic.turns // traffic.picture_every) if traffic.picture_every else 1
    room = pictures * model.visual + traffic.system + 900
    specs = _specs(recalls=traffic in RECALLED, limit_mm_per_prompt={"image": pictures})
    ask = seeded(lambda worker, number: worker.call(converse, traffic, number))
    wave = engine_wave(settings, model, specs, ask, progress, room=room, requests=2)
    for name, about in wave["engines"].items():
        # A block of stock's pool holds all layers, one of a routed pool one layer.
        layers = model.depth if name == STOCK else 1
        about["block_bytes"] = layers * model.kv_bytes * BLOCK_SIZE
    return wave


def _measure_many(settings: Settings, conversations: int, progress: Progress) -> dict:
    model = settings.narrow()
    specs = _specs(max_num_seqs=max(8, conversations))
    ask = seeded(lambda worker, number: worker.call(together, MANY, conversations, number))
    room = model.visual + 400
    return engine_wave(settings, model, specs, ask, progress, room=room, requests=conversations)


def summarise(measured: Mapping[str, dict]) -> dict:
    alone = [_alone_row(t, measured[t.kind]) for t in ALONE if t.kind in measured]
    many = [
        _many_row(int(name.removeprefix("many-")), wave)
        for name, wave in measured.items()
        if name.startswith("many-")
    ]
    turns = measured.get(TURNS.kind)
    return {
        "alone": alone,
        "many": sorted(many, key=lambda row: row["conversations"]),
        "by_turn": _by_turn(turns) if turns else {},
        "held": _held(turns) if turns else {},
        "targets": list(_targets(turns, many)),
    }


def _alone_row(traffic: Traffic, wave: Mapping) -> dict:
    stock = column(wave["engines"][STOCK], "first_token_s")
    return {
        "traffic": traffic.name,
        "seconds": Spread.of(stock).as_row(),
        **{
            name: Spread.of(paired(column(about, "first_token_s"), stock)).as_row()
            for name, about in wave["engines"].items()
            if name != STOCK
        },
    }


def _many_row(conversations: int, wave: Mapping) -> dict:
    """Requests per second, over stock's."""
    stock = column(wave["engines"][STOCK], "total_s")
    return {
        "conversations": conversations,
        **{
            name: Spread.of(paired(stock, column(about, "total_s"))).as_row()
            for name, about in wave["engines"].items()
            if name != STOCK
        },
    }


def _by_turn(wave: Mapping) -> dict[str, list[dict]]:
    """Sums of times to first token up to each turn, over stock's."""
    sums = {
        name: [list(accumulate(sample["each_s"])) for sample in about["samples"]]
        for name, about in wave["engines"].items()
    }
    return {
        name: [
            Spread.of(paired(own, base)).as_row()
            for own, base in zip(zip(*of, strict=True), zip(*sums[STOCK], strict=True), strict=True)
        ]
        for name, of in sums.items()
        if name != STOCK
    }


def _held(wave: Mapping) -> dict[str, float]:
    """Bytes of the last turn, over stock's."""

    def held(about: Mapping) -> float:
        return Spread.of(column(about, "held_blocks")).median * about["block_bytes"]

    stock = held(wave["engines"][STOCK])
    return {name: held(about) / stock for name, about in wave["engines"].items() if name != STOCK}


def _targets(turns: Mapping | None, many: list[dict]) -> Iterator[dict]:
    if turns:
        for name, bound in targets.KEPT_CHAT.items():
            yield targets.at_most(
                f"five turns about one picture, {name}, over stock",
                _by_turn(turns)[name][4]["median"],
                bound,
            )
    for row in many:
        for name in targets.KEPT_CHAT:
            yield targets.at_least(
                f"requests/s, {row['conversations']} conversations at once, {name}, of stock",
                row[name]["median"],
                targets.SERVING,
            )


def markdown(found: dict) -> Iterator[str]:
    names = [name for name in CONFIGURATIONS if name != STOCK]
    yield READING + "\n"
    if found["by_turn"]:
        yield f"![Sum of times to first token by turn]({PLOT})\n"
        turns = range(1, 1 + len(found["by_turn"][names[0]]))
        yield f"| turns about one picture | {' | '.join(map(str, turns))} |"
        yield "|---|" + "---|" * len(turns)
        for name, ratios in found["by_turn"].items():
            yield f"| {name} | {' | '.join(shown(ratio) for ratio in ratios)} |"
        rows = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found["held"].items())
        yield "\n" + HELD.format(rows=rows) + "\n"
    if found["alone"]:
        yield f"| sum of times to first token | stock, ms | {' | '.join(names)} |"
        yield "|---|---|" + "---|" * len(names)
        for row in found["alone"]:
            yield (
                f"| {row['traffic']} | {shown(row['seconds'], 1000, 0)} | "
                f"{' | '.join(_cell(row, name) for name in names)} |"
            )
    if found["many"]:
        names = [name for name in names if name in found["many"][0]]
        yield f"\n{MANY.name.capitalize()} at once, answers of 8 tokens: requests/s over stock's, above 1 is faster.\n"
        yield f"| at once | {' | '.join(names)} |"
        yield "|---|" + "---|" * len(names)
        for row in found["many"]:
            yield f"| {row['conversations']} | {' | '.join(shown(row[name]) for name in names)} |"


def _cell(row: Mapping, name: str) -> str:
    return shown(row[name]) if name in row else "-"


def draw(found: dict, folder: Path) -> list[Path]:
    if not found["by_turn"]:
        return []
    lines = {name: list(enumerate(ratios, 1)) for name, ratios in found["by_turn"].items()}
    last = len(next(iter(lines.values())))
    return [
        plot.lines(
            folder / PLOT,
            lines,
            xlabel="turns about one picture",
            ylabel="sum of times to first token / stock vLLM",
            bounds={"stock vLLM": [(1, 1.0), (last, 1.0)]},
        )
    ]
