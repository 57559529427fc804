"""What counting for `/metrics` costs: one routed engine that counts in every other step.

    python -m benchmarks.metrics_cost

The model is the thin one of `make bench`, of a few values per token, so that a step is mostly host. Steps with and
without counting take turns in the same engine, in an order that chance decides for every pair, and a difference is
formed within a pair: whatever slows the machine down slows both. Without, nothing of it is called: not the scheduler's
counts, not the front end's logger, and in a step that decides neither what was chosen nor its copy.
"""

import argparse
import contextlib
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.bench import device
from benchmarks.bench.__main__ import OUT
from benchmarks.bench.driving import Workload, add_request, build_engine
from benchmarks.bench.engines import EngineSpec, engine_arguments
from benchmarks.bench.parts.machinery import keep_nearly_all
from benchmarks.bench.settings import FULL, Settings
from benchmarks.bench.worker import Worker

STAGES = 5
TEXT_ROOM = 128
REQUESTS, DECODE_PAIRS, PREFILL_PAIRS = 8, 1000, 150
WARM_UP = 5


class Silent:
    """Does nothing, whatever it is asked to do."""

    def __getattr__(self, name: str) -> Callable[..., dict]:
        return lambda *args, **kwargs: {}


class CountingEngine:
    """A routed engine whose counting can be switched off for a while."""

    def __init__(self, llm: Any) -> None:
        """llm: its engine core must be in this process."""
        self.llm, self.engine = llm, llm.llm_engine
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.worker = core.model_executor.driver_worker.worker

    def _stock_sampling(self) -> Any:
        """The worker's `sample_tokens` without what routing adds."""
        from vllm_reroute.runners.worker import RoutedWorker

        order = type(self.worker).__mro__
        stock: Any = order[order.index(RoutedWorker) + 1]
        return stock.sample_tokens.__get__(self.worker)

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """While entered, steps run as if there were no metrics of routing."""
        from vllm_reroute.metrics.stat_logger import RoutedStatLogger
        from vllm_reroute.routing import decoder

        (shown,) = (
            logger
            for logger in self.engine.logger_manager.stat_loggers
            if isinstance(logger, RoutedStatLogger)
        )
        replaced = [
            (self.scheduler, "counts", Silent()),
            (self.scheduler, "decided_turns", Silent()),
            (self.worker, "sample_tokens", self._stock_sampling()),
            (decoder, "StepDecisions", lambda plan: Silent()),
            (shown, "record", lambda *args, **kwargs: None),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, other in replaced:
                stack.callback(_give_back, owner, name, vars(owner).get(name, _ABSENT))
                setattr(owner, name, other)
            yield
            self.worker.get_model().routed_decoder.take_decisions()

    def pair(self, timed: Callable[[], float], chance: random.Random) -> tuple[float, float]:
        """Seconds with counting, and without."""
        counts_first = chance.random() < 0.5
        counted = timed() if counts_first else 0.0
        with self.uncounted():
            uncounted = timed()
        return counted if counts_first else timed(), uncounted

    def decode_step(self) -> float:
        """All requests under way decode."""
        started = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - started

    def prefill(self) -> float:
        """The step that runs a prompt and takes its decisions, the only one of its request."""
        work = Workload()
        add_request(self.llm, work, work.pictures())
        seconds = self.decode_step()
        assert not self.engine.has_unfinished_requests()
        return seconds

    def begin_decoding(self) -> None:
        work = Workload(answer_tokens=2 * (DECODE_PAIRS + WARM_UP) + REQUESTS, text=1)
        for _ in range(REQUESTS):
            add_request(self.llm, work, work.pictures())
        running = self.scheduler.requests.values()
        while any(request.num_output_tokens == 0 for request in running):
            self.engine.step()


_ABSENT = object()


def _give_back(owner: Any, name: str, before: Any) -> None:
    if before is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, before)


def shown(what: str, pairs: list[tuple[float, float]]) -> str:
    """Median difference with its 95 % interval, by rank, in µs and in percent of the step."""
    without = statistics.median(other for _, other in pairs)
    differences = sorted(one - other for one, other in pairs)
    reach = 0.98 * len(pairs) ** 0.5
    low, high = (differences[int(len(pairs) / 2 + sign * reach)] for sign in (-1, 1))
    middle = statistics.median(differences)
    micro = ", ".join(f"{1e6 * one:+.0f}" for one in (middle, low, high))
    percent = ", ".join(f"{100 * one / without:+.2f}" for one in (middle, low, high))
    return (
        f"{what}: {1e3 * without:.2f} ms without; counting adds (median, low, high) "
        f"{micro} µs = {percent} %, of {len(pairs)} pairs"
    )


def measure(state: dict, seed: int) -> list[str]:
    """In the engine's process, see `bench/worker.py`."""
    counting, chance = CountingEngine(state["llm"]), random.Random(seed)
    found = []
    for what, begin, timed, count in (
        ("prefill of one image", lambda: None, counting.prefill, PREFILL_PAIRS),
        (f"decode step of {REQUESTS}", counting.begin_decoding, counting.decode_step, DECODE_PAIRS),
    ):
        begin()
        pairs = [counting.pair(timed, chance) for _ in range(WARM_UP + count)]
        found.append(shown(what, pairs[WARM_UP:]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.metrics_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order within pairs")
    args = parser.parse_args()
    os.environ.update(device.environment())
    settings = Settings(sizes=FULL, folder=OUT)
    model = settings.thin()
    spec = EngineSpec(
        name="counts",
        options=keep_nearly_all(STAGES, model.depth, model.visual),
        changes={"disable_log_stats": False},
    )
    room = model.visual + TEXT_ROOM + 2 * DECODE_PAIRS
    with Worker(spec.name, settings.logs) as worker:
        worker.call(build_engine, engine_arguments(settings, model, spec, room, REQUESTS))
        print("\n".join(worker.call(measure, args.seed)))


if __name__ == "__main__":
    main()
