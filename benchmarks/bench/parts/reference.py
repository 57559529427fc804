"""The same checkpoint, image and schedule on plain transformers, the way research code routes."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks.bench import engines
from benchmarks.bench.driving import Workload, drive
from benchmarks.bench.engines import STOCK, EngineSpec, take_turns
from benchmarks.bench.progress import Progress
from benchmarks.bench.settings import Settings
from benchmarks.bench.spread import Spread, paired, shown
from benchmarks.bench.worker import Worker
from vllm_reroute.schedule import RerouteOptions

TITLE = "Against plain transformers"
TEXT_ROOM = 256
SCHEDULE = "pdrop reroute 192"
OPTIONS = {"schedule": "pdrop", "tier": 192}
DENSE_PLAIN, ROUTED_PLAIN = "transformers generate", f"transformers, {SCHEDULE}"
SAME_ANSWER = {DENSE_PLAIN: STOCK, ROUTED_PLAIN: f"vLLM, {SCHEDULE}"}
READING = """\
One image request of {tokens} answer tokens, from the raw image, batch 1. `transformers generate` is the library's own;
"transformers, {schedule}" is this suite's routed loop over the model's own layers with fused attention (SDPA) and a
`DynamicCache` (`routed_generate.py`). Requests per second: batch 1 for transformers, one after another, and for
vLLM {requests} at once. Ratios are to `transformers generate` in the same round. *Same tokens* compares the greedy
answer with vLLM's under the same schedule; in 16 bit near-ties may fall either way."""


def waves(settings: Settings, progress: Progress) -> dict[str, Callable[[], dict]]:
    return {"batch-1": partial(_measure, settings, progress)}


def build_plain(state: dict, folder: Path, dtype: str, options: dict | None, depth: int) -> None:
    """Runs in the worker."""
    from benchmarks.bench.routed_generate import PlainModel

    schedule = RerouteOptions.from_mapping(options).resolve(depth) if options else None
    state["plain"] = PlainModel(folder, dtype, schedule)


def answer_plain(state: dict, work: Workload) -> dict:
    """Runs in the worker."""
    return state["plain"].answer(work.prompt(), work.pictures(), work.answer_tokens)


def _measure(settings: Settings, progress: Progress) -> dict:
    model, sizes = settings.wide(), settings.sizes
    one = Workload(answer_tokens=sizes.answer_tokens)
    many = Workload(answer_tokens=sizes.answer_tokens, requests=sizes.reference_requests)
    specs = [EngineSpec(name=STOCK), EngineSpec(name=f"vLLM, {SCHEDULE}", options=OPTIONS)]
    with contextlib.ExitStack() as stack:
        plain = {}
        for name, options in ((DENSE_PLAIN, None), (ROUTED_PLAIN, OPTIONS)):
            progress.say(f"starting {name}")
            worker = stack.enter_context(Worker(name, settings.logs, settings.start_limit_s))
            worker.call(build_plain, model.folder, settings.dtype, options, model.depth)
            plain[name] = worker
        room = model.visual + TEXT_ROOM
        vllm = stack.enter_context(
            engines.started(settings, model, specs, room, many.requests, progress)
        )

        def ask(name: str) -> dict:
            if name in plain:
                found = plain[name].call(answer_plain, one)
                return found | {"per_s": 1 / found["total_s"]}
            found = vllm[name].call(drive, one)
            per_s = many.requests / vllm[name].call(drive, many)["total_s"]
            return {key: found[key] for key in ("answer", "first_token_s", "total_s")} | {
                "per_s": per_s
            }

        samples = take_turns([*plain, *vllm], ask, settings.rounds, progress)
    return {
        "samples": samples,
        "answer_tokens": sizes.answer_tokens,
        "requests": many.requests,
    }


def summarise(measured: Mapping[str, dict]) -> dict:
    if not measured:
        return {"rows": [], "targets": []}
    wave = measured["batch-1"]
    samples = wave["samples"]

    def column(name: str, key: str) -> list[float]:
        return [sample[key] for sample in samples[name]]

    rows = []
    for name in samples:
        ratios = {
            key: paired(column(DENSE_PLAIN, key), column(name, key))
            for key in ("first_token_s", "total_s")
        } | {"per_s": paired(column(name, "per_s"), column(DENSE_PLAIN, "per_s"))}
        rows.append(
            {
                "name": name,
                **{
                    key: {
                        "value": Spread.of(column(name, key)).as_row(),
                        "gain": Spread.of(ratio).as_row(),
                    }
                    for key, ratio in ratios.items()
                },
                "same_tokens": (
                    samples[name][0]["answer"] == samples[SAME_ANSWER[name]][0]["answer"]
                    if name in SAME_ANSWER
                    else None
                ),
            }
        )
    return {
        "rows": rows,
        "answer_tokens": wave["answer_tokens"],
        "requests": wave["requests"],
        "targets": [],
    }


def markdown(found: dict) -> Iterator[str]:
    if not found["rows"]:
        return
    yield (
        READING.format(tokens=found["answer_tokens"], requests=found["requests"], schedule=SCHEDULE)
        + "\n"
    )
    yield (
        "| | first token, ms | gain | request, ms | gain | requests/s | gain | same tokens as vLLM |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in found["rows"]:
        cells = []
        for key, scale, digits in (
            ("first_token_s", 1000, 0),
            ("total_s", 1000, 0),
            ("per_s", 1, 2),
        ):
            cells += [shown(row[key]["value"], scale, digits), shown(row[key]["gain"])]
        same = {True: "yes", False: "no", None: ""}[row["same_tokens"]]
        yield f"| {row['name']} | {' | '.join(cells)} | {same} |"


def draw(found: dict, folder: Path) -> list[Path]:
    """Nothing: four rows are a table."""
    return []
