"""`python -m benchmarks.storm --url http://127.0.0.1:8000`: exit status 0 if nothing went wrong."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from benchmarks.storm.run import Outcome, Storm, run

SHOWN_PROBLEMS = 20


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storm", description=__doc__)
    parser.add_argument("--url", required=True, help="a server on this machine")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=16, help="requests under way at any time")
    parser.add_argument("--seed", type=int, default=0, help="the same seed sends the same requests")
    parser.add_argument(
        "--stock", action="store_true", help="the server does not route: it refuses less"
    )
    parser.add_argument("--pid", type=int, help="the server's first process, to watch its memory")
    parser.add_argument("--out", type=Path, help="also write the outcome there, as JSON")
    return parser.parse_args(words)


def report(outcome: Outcome) -> str:
    """A table of what was answered, and the verdict."""
    lines = ["| request: answer | times |", "|---|---|"]
    lines += [f"| {name} | {times} |" for name, times in sorted(outcome.counts.items())]
    total = sum(outcome.counts.values())
    lines += ["", f"{total} requests in {outcome.seconds:.0f} s; at the end {outcome.state}"]
    if outcome.memory_mib:
        mib = " → ".join(f"{mib:.0f}" for mib in outcome.memory_mib)
        lines.append(f"memory of the server's processes, after each third: {mib} MiB")
    shown, more = outcome.problems[:SHOWN_PROBLEMS], outcome.problems[SHOWN_PROBLEMS:]
    lines += [f"PROBLEM: {problem}" for problem in shown]
    lines += [f"… and {len(more)} more"] * bool(more)
    lines.append(f"{len(outcome.problems)} problems")
    return "\n".join(lines)


def main() -> int:
    args = parse_arguments()
    try:
        storm = Storm(
            url=args.url.rstrip("/"),
            requests=args.requests,
            at_once=args.at_once,
            seed=args.seed,
            routed=not args.stock,
            pid=args.pid,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    outcome = asyncio.run(run(storm))
    print(report(outcome))
    if args.out:
        args.out.write_text(outcome.as_json() + "\n", encoding="utf-8")
    return bool(outcome.problems)


if __name__ == "__main__":
    sys.exit(main())
