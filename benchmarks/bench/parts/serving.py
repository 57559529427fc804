"""Real HTTP servers under load: `vllm bench serve` at rising concurrency."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks.bench import device, plot, targets
from benchmarks.bench.client import KEYS, RATE, bench_serve, command
from benchmarks.bench.engines import take_turns
from benchmarks.bench.progress import Progress
from benchmarks.bench.settings import BenchModel, Settings
from benchmarks.bench.spread import Spread, paired, shown
from benchmarks.bench.worker import Worker
from benchmarks.local_server import LocalServer
from benchmarks.quality.methods import server_flags
from vllm_reroute.schedule import RerouteOptions

TITLE = "Serving"
PLOT, PLOT_FIRST_TOKEN = "serving.svg", "serving-ttft.svg"
SERVED_NAME = "bench"
DENSE = "dense"
SERVERS = {
    DENSE: None,
    "pdrop reroute 192": RerouteOptions(schedule="pdrop", tier=192),
}
# Random texts grow when their tokens are joined and split again.
TEXT_ROOM = 512
STEP_PROMPTS = 4
IMAGE_SIZE = 336
READING = """\
`vllm bench serve` with `random-mm` (one new image of {size} x {size} pixels and some 48 tokens of text per
request, answers of {answer} tokens) against `vllm serve` processes that are up together and asked in turn; in a round
all servers get the same requests. TTFT and TPOT are the client's, in ms; the table shows medians over rounds of each
run's p50 and p99, and for requests per second the range as well. *Over dense* is the ratio in the same round. Client
and server share the machine."""


def waves(settings: Settings, progress: Progress) -> dict[str, Callable[[], dict]]:
    return {"load": partial(_measure, settings, progress)}


def _flags(settings: Settings, model: BenchModel) -> list[str]:
    most, room = max(settings.sizes.levels), model.visual + TEXT_ROOM
    flags = {
        "--served-model-name": SERVED_NAME,
        "--dtype": settings.dtype,
        "--max-model-len": room,
        "--max-num-seqs": most,
        "--max-num-batched-tokens": max(2048, STEP_PROMPTS * room),
        "--block-size": device.BLOCK_SIZE,
        # Room for all requests of a dense server: capacity is another part's question.
        "--kv-cache-memory-bytes": most * room * model.kv_bytes * model.depth,
        "--mm-processor-cache-gb": 0,
    }
    if device.ON_GPU:
        # Servers are up together, and each asks for its share of the device.
        flags["--gpu-memory-utilization"] = round(0.9 / len(SERVERS), 3)
    words = [str(word) for pair in flags.items() for word in pair] + ["--no-enable-prefix-caching"]
    return [*words, "--enforce-eager"] if settings.eager else words


def _measure(settings: Settings, progress: Progress) -> dict:
    model, sizes = settings.narrow(), settings.sizes
    levels = {}
    with contextlib.ExitStack() as stack:
        urls = {}
        for name, options in SERVERS.items():
            progress.say(f"starting the {name} server")
            arguments = _flags(settings, model) + (server_flags(options) if options else [])
            server = LocalServer(name, model.folder, arguments, settings.start_limit_s)
            server.log = settings.logs / f"serve-{name.replace(' ', '-')}.log"
            settings.logs.mkdir(parents=True, exist_ok=True)
            with progress.server_lines():
                urls[name] = stack.enter_context(server).url
        client = stack.enter_context(Worker("client", settings.logs))
        seeds = iter(range(1, 10**6))

        def run(name: str, at_once: int, seed: int, warming_up: bool) -> dict:
            requests = sizes.least_requests
            if not warming_up:
                requests = max(requests, int(sizes.requests_per_level * at_once))
            words = command(
                urls[name], model.folder, SERVED_NAME, IMAGE_SIZE, requests, at_once,
                sizes.answer_tokens, seed,
            )  # fmt: skip
            return client.call(bench_serve, words)

        for level in sizes.levels:
            progress.begin(f"serving, {level} at once")
            # A round's requests are the same for everyone, and every round's are new.
            turns = [next(seeds) for _ in range(settings.rounds + 1)]
            asked = dict.fromkeys(urls, 0)

            def ask(
                name: str, level: int = level, turns: list = turns, asked: dict = asked
            ) -> dict:
                asked[name] += 1
                return run(name, level, turns[asked[name] - 1], warming_up=asked[name] == 1)

            levels[str(level)] = take_turns(list(urls), ask, settings.rounds, progress)
    return {"levels": levels, "answer_tokens": sizes.answer_tokens}


def summarise(measured: Mapping[str, dict]) -> dict:
    rows, found_targets = [], []
    for level, servers in measured.get("load", {"levels": {}})["levels"].items():
        dense = [sample[RATE] for sample in servers[DENSE]]
        for name, samples in servers.items():
            ratio = Spread.of(paired([sample[RATE] for sample in samples], dense))
            rows.append(
                {
                    "level": int(level),
                    "server": name,
                    "over_dense": ratio.as_row(),
                    **{key: Spread.of(s[key] for s in samples).as_row() for key in KEYS},
                }
            )
            if name != DENSE:
                found_targets.append(
                    targets.at_least(
                        f"requests/s, {name} over dense, {level} at once",
                        ratio.median,
                        targets.SERVING,
                    )
                )
    answer = measured["load"]["answer_tokens"] if rows else None
    return {"rows": rows, "answer_tokens": answer, "targets": found_targets}


def markdown(found: dict) -> Iterator[str]:
    if not found["rows"]:
        return
    yield f"![Requests per second against concurrency]({PLOT})\n"
    yield f"![Time to first token against concurrency]({PLOT_FIRST_TOKEN})\n"
    yield READING.format(size=IMAGE_SIZE, answer=found["answer_tokens"]) + "\n"
    yield "| at once | server | requests/s | over dense | TTFT p50 | p99 | TPOT p50 | p99 |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in found["rows"]:
        times = " | ".join(f"{row[key]['median']:,.1f}" for key in KEYS if key != RATE)
        yield (
            f"| {row['level']} | {row['server']} | {shown(row[RATE])} | {shown(row['over_dense'])} | "
            f"{times} |"
        )


def draw(found: dict, folder: Path) -> list[Path]:
    if not found["rows"]:
        return []
    plots = ((PLOT, RATE, "requests per second"), (PLOT_FIRST_TOKEN, "p50_ttft_ms", "TTFT p50, ms"))
    paths = []
    for name, key, label in plots:
        groups: dict[str, list] = {}
        for row in found["rows"]:
            groups.setdefault(row["server"], []).append((row["level"], row[key]))
        paths.append(
            plot.lines(folder / name, groups, xlabel="requests at once", ylabel=label, log_x=True)
        )
    return paths
