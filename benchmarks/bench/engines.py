"""Engines of one wave: what each is built with, and how they take turns."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, repeat
from typing import Any

from benchmarks.bench import device
from benchmarks.bench.driving import build_engine
from benchmarks.bench.progress import Progress
from benchmarks.bench.settings import BenchModel, Settings
from benchmarks.bench.worker import Worker
from vllm_reroute.schedule import RerouteOptions, RoutingSchedule

STOCK, SHALLOW = "stock", "stock, shallow"


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One engine. options: reroute options, None for stock. depth: None for the model's own.

    compiled: None for the run's default. changes: of the arguments all engines of a wave share.
    """

    name: str
    options: Mapping[str, Any] | None = None
    depth: int | None = None
    compiled: bool | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    def schedule(self, model: BenchModel) -> RoutingSchedule | None:
        if self.options is None:
            return None
        return RerouteOptions.from_mapping(self.options).resolve(self.depth or model.depth)

    def about(self, model: BenchModel) -> dict:
        """What the report needs to know of it."""
        schedule, depth = self.schedule(model), self.depth or model.depth
        stages = [(s.num_layers, s.keep_ratio) for s in schedule.stages] if schedule else []
        return {
            "options": dict(self.options) if self.options is not None else None,
            "depth": depth,
            "compiled": self.compiled,
            "average": schedule.average(model.visual) if schedule else float(model.visual),
            "groups": len(stages),
            "kept": [
                [layers, kept]
                for (layers, _), kept in zip(
                    stages, schedule.kept_per_stage(model.visual), strict=True
                )
            ]
            if schedule
            else [[depth, model.visual]],
        }


def engine_arguments(
    settings: Settings, model: BenchModel, spec: EngineSpec, room: int, requests: int
) -> dict[str, Any]:
    """`LLM`'s arguments. room: tokens of the longest request; requests: at once in one step."""
    compiled = not settings.eager if spec.compiled is None else spec.compiled
    arguments: dict[str, Any] = {
        "model": str(model.folder),
        "dtype": settings.dtype,
        "enforce_eager": not compiled,
        "max_model_len": room,
        "max_num_batched_tokens": max(room * requests, 2048),
        "max_num_seqs": max(requests, 8),
        "block_size": device.BLOCK_SIZE,
        # What dense requests need, and some more for blocks that are not full.
        "kv_cache_memory_bytes": int((requests + 0.25) * room) * model.kv_bytes * model.depth,
        # Every request shall really encode its images.
        "enable_prefix_caching": False,
        "mm_processor_cache_gb": 0,
        "additional_config": {"reroute": dict(spec.options)} if spec.options is not None else {},
    }
    if device.ON_GPU:
        # Each asks for its share of the device at start, whatever the pool above takes.
        arguments["gpu_memory_utilization"] = round(0.9 / settings.at_once, 3)
    if spec.depth is not None and spec.depth != model.depth:
        # Random weights of the same widths: no checkpoint has that depth, and time does not care.
        arguments["load_format"] = "dummy"
        arguments["hf_overrides"] = {"text_config": {"num_hidden_layers": spec.depth}}
    return arguments | dict(spec.changes)


@contextlib.contextmanager
def started(
    settings: Settings,
    model: BenchModel,
    specs: Sequence[EngineSpec],
    room: int,
    requests: int,
    progress: Progress,
) -> Iterator[dict[str, Worker]]:
    """All engines by name, each in a process of its own, idle until asked."""
    with contextlib.ExitStack() as stack:
        progress.say(f"starting {len(specs)} engines")
        workers = {
            spec.name: stack.enter_context(Worker(spec.name, settings.logs, settings.start_limit_s))
            for spec in specs
        }
        arguments = [engine_arguments(settings, model, spec, room, requests) for spec in specs]
        with ThreadPoolExecutor(device.STARTS_AT_ONCE) as pool:
            # Listed, so that an engine's error is raised here.
            list(pool.map(Worker.call, workers.values(), repeat(build_engine), arguments))
        yield workers


def take_turns(
    names: Sequence[str], ask: Callable[[str], dict], rounds: int, progress: Progress
) -> dict[str, list[dict]]:
    """Everyone is asked once a round, one at a time; the first round is discarded.

    Each round begins with another of them, so that none always follows the same neighbour.
    """
    samples: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in (*names[shift:], *names[:shift]):
            progress.turn(f"round {number} of {rounds}" if number else "warming up", name)
            found = ask(name)
            if number:
                samples[name].append(found)
    return samples


def engine_wave(
    settings: Settings,
    model: BenchModel,
    specs: Sequence[EngineSpec],
    ask: Callable[[Worker], dict],
    progress: Progress,
    *,
    room: int,
    requests: int = 1,
) -> dict:
    """Starts the engines, lets them take turns, and says what each was."""
    with started(settings, model, specs, room, requests, progress) as workers:
        samples = take_turns(
            list(workers), lambda name: ask(workers[name]), settings.rounds, progress
        )
    return {
        "visual": model.visual,
        "depth": model.depth,
        "engines": {
            spec.name: spec.about(model) | {"samples": samples[spec.name]} for spec in specs
        },
    }


def seeded(ask: Callable[[Worker, int], dict]) -> Callable[[Worker], dict]:
    """For `engine_wave`: with the round's number, the same for all engines of a round."""
    rounds: dict[str, Iterator[int]] = defaultdict(count)
    return lambda worker: ask(worker, next(rounds[worker.name]))


def chunked(
    base: Sequence[EngineSpec], others: Sequence[EngineSpec], at_once: int
) -> list[list[EngineSpec]]:
    """The engines in as few waves as fit `at_once`; the base is in all of them.

    Neighbours of a pair stay together wherever more than one fits.
    """
    size = at_once - len(base)
    size = len(others) if size >= len(others) else max(1, size - size % 2)
    return [[*base, *others[i : i + size]] for i in range(0, len(others), size)]


def column(engine: Mapping, *keys: str) -> list[float]:
    """One measured value of an engine, round by round."""
    values = []
    for sample in engine["samples"]:
        for key in keys:
            sample = sample[key]
        values.append(sample)
    return values
