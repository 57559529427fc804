"""The 7B-shaped engine that `speed` and `profile` measure."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu.drive import Driver, model_folder
from benchmarks.gpu.engine import build, in_use
from benchmarks.gpu.record import Record

SIZES = [1, 2, 4, 8, 16, 32, 64]
MIXED_SIZES = [128, 256, 512]
DEPTH = 32


def engine_arguments(about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--schedule", choices=("none", "pdrop", "fastv"), default="none")
    parser.add_argument("--tier", type=int, default=64)
    parser.add_argument("--action", default="reroute")
    parser.add_argument("--stages", type=int, help="that many decisions which save nothing")
    parser.add_argument("--compiled", action="store_true", help="torch.compile and all graphs")
    return parser


def options(args: argparse.Namespace) -> dict | None:
    """Reroute options; None for stock."""
    if args.stages:
        apart = (DEPTH - 2) // args.stages
        return {
            "layers": [1 + i * apart for i in range(args.stages)],
            "keep": [0.999 - 0.002 * i for i in range(args.stages)],
            "action": args.action,
        }
    if args.schedule == "none":
        return None
    return {"schedule": args.schedule, "tier": args.tier, "action": args.action}


@contextmanager
def driven(args: argparse.Namespace, record: Record) -> Iterator[Driver]:
    """An engine that has answered a few requests."""
    compilation: dict[str, Any] = {"cudagraph_capture_sizes": SIZES + MIXED_SIZES * args.compiled}
    if not args.compiled:
        compilation |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    room = (
        {"kv_cache_memory_bytes": 256 * 2**20} if args.trial else {"gpu_memory_utilization": 0.85}
    )
    with tempfile.TemporaryDirectory() as folder:
        llm = build(
            model_folder(Path(folder), trial=args.trial), options(args), trial=args.trial,
            load_format="dummy", dtype="bfloat16", max_model_len=2048,
            max_num_batched_tokens=8192, max_num_seqs=64, enable_prefix_caching=False,
            limit_mm_per_prompt={"image": 1}, mm_processor_cache_gb=0,
            compilation_config=compilation, **room,
        )  # fmt: skip
        record.put(options=options(args), engine=in_use(llm))
        driver = Driver(llm, trial=args.trial)
        driver.run(driver.requests(2), 4, 1)
        driver.run(driver.requests(2 if args.trial else 9), 4, 8)
        yield driver
