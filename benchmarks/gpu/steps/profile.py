"""Where a prefill and a decode step spend host and device time; launches and copies are counted."""

import argparse
from collections import Counter
from typing import Any

from benchmarks.gpu.drive import Driver
from benchmarks.gpu.record import Record, run_step
from benchmarks.gpu.shaped_engine import driven, engine_arguments

TOP = 20
PHASES = {
    # name: requests, tokens of each, at once
    "prefill": (4, 1, 1),
    "decode of 1": (1, 33, 1),
    "decode of 8": (8, 33, 8),
}


def main(args: argparse.Namespace, record: Record) -> None:
    with driven(args, record) as driver:
        for name, (count, tokens, at_once) in PHASES.items():
            if args.trial:
                count, tokens = 1, min(tokens, 3)
            record.put(**{name: profiled(driver, count, tokens, at_once, trial=args.trial)})
    record.put(passed=True)


def profiled(driver: Driver, count: int, tokens: int, at_once: int, *, trial: bool) -> dict:
    """One phase under torch's profiler, which slows the host down: shares count, not sums."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    inputs = driver.requests(count)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not trial)
    with profile(activities=kinds) as found:
        times = driver.run(inputs, tokens, at_once)
        if not trial:
            torch.cuda.synchronize()
    return {"wall_ms": round(1e3 * times.wall, 3), **summed(found.events())}


def summed(events: Any) -> dict:
    """Kernels and copies by device time, CUDA runtime calls by number."""
    device, calls, runtime = Counter[str](), Counter[str](), Counter[str]()
    for event in events:
        if str(event.device_type).endswith("CUDA"):
            if not event.is_user_annotation:
                device[event.name[:70]] += event.time_range.elapsed_us()
                calls[event.name[:70]] += 1
        elif event.name.startswith(("cuda", "cu")):
            runtime[event.name] += 1
    return {
        "device_ms": round(sum(device.values()) / 1e3, 3),
        "device_events": calls.total(),
        "runtime_calls": dict(runtime.most_common(12)),
        "top": [[name, round(us / 1e3, 3), calls[name]] for name, us in device.most_common(TOP)],
    }


if __name__ == "__main__":
    run_step(engine_arguments(__doc__), main)
