"""Time to first token, decode step and requests/s of a 7B-shaped engine; weights are dummies."""

import argparse
import gc
from statistics import median

from benchmarks.gpu.record import Record, run_step
from benchmarks.gpu.shaped_engine import driven, engine_arguments
from benchmarks.gpu.timing import spread_ms

CONCURRENCY = (1, 8, 32)


def main(args: argparse.Namespace, record: Record) -> None:
    trial = args.trial
    with driven(args, record) as driver:
        gc.collect()
        gc.freeze()
        count = 2 if trial else 16
        for name, image in (("image", True), ("text", False)):
            times = driver.run(driver.requests(count, image=image), 1, 1)
            record.put(**{f"first_token_{name}_ms": spread_ms(times.first)})
        for batch in CONCURRENCY[:2] if trial else CONCURRENCY:
            tokens = 3 if trial else 65
            times = driver.run(driver.requests(batch), tokens, batch)
            step = median(times.rest) / (tokens - 1)
            record.put(**{f"decode_step_{batch}_ms": round(1e3 * step, 4)})
        for at_once in CONCURRENCY[:2] if trial else CONCURRENCY:
            count = at_once + 1 if trial else {1: 8, 8: 40, 32: 128}[at_once]
            times = driver.run(driver.requests(count), 2 if trial else 32, at_once)
            record.put(
                **{
                    f"requests_per_s_{at_once}": round(count / times.wall, 3),
                    f"first_token_at_{at_once}_ms": spread_ms(times.first),
                }
            )
    # There is nothing to be right or wrong: it has run.
    record.put(passed=True)


if __name__ == "__main__":
    run_step(engine_arguments(__doc__), main)
