"""`make gpu`: is this right and how fast is it, on a machine with a GPU and vllm-reroute installed?

Every step is a process of its own with a time limit; one that fails does not end the others. The
report is written after each: `gpu.md` and `gpu.json`, with `logs/` beside them.

    make gpu                                   # everything
    make gpu ARGS="--only environment kernels oracle graphs"   # whether it is right
    make gpu ARGS="--only speed"               # names, or how they begin
    make gpu ARGS="--trial"                    # tiny, on CPU: that the steps run; its numbers mean nothing
    make gpu ARGS="--list"
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench.device import environment
from benchmarks.gpu.plan import STEPS, Step, chosen
from benchmarks.gpu.report import write_report

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / ".local" / "gpu"


def main() -> None:
    args = parse_arguments()
    if args.list:
        print("\n".join(f"{s.name:18} at most {s.limit_s:4} s  {s.about}" for s in STEPS))
        return
    try:
        steps = chosen(args.only)
        check_machine(args.trial)
    except ValueError as error:
        sys.exit(f"gpu: {error}")
    failed = []
    try:
        for step in steps:
            print(f"{step.name}: {step.about}", flush=True)
            outcome = run(step, args.out, trial=args.trial)
            write_report(args.out)
            print(f"  {outcome}", flush=True)
            if outcome != "passed":
                failed.append(step.name)
    except KeyboardInterrupt:
        sys.exit("\nStopped; what is finished is in the report.")
    print(f"Report: {args.out / 'gpu.md'}")
    if failed:
        sys.exit(f"gpu: not passed: {', '.join(failed)}. See the report and {args.out / 'logs'}.")


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """words: the command line's, unless given."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="some of the steps")
    parser.add_argument("--trial", action="store_true", help="tiny, on CPU; numbers mean nothing")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder (default: {OUT})")
    parser.add_argument("--list", action="store_true", help="show the steps and end")
    return parser.parse_args(words)


def check_machine(trial: bool) -> None:
    """Raises ValueError where there is no GPU, unless it is a trial, and where there is one for a trial."""
    has_gpu = shutil.which("nvidia-smi") is not None
    if not has_gpu and not trial:
        raise ValueError(
            "no GPU found (nvidia-smi is missing). Run it on a machine with one, or add --trial to see "
            "whether the steps run on CPU."
        )
    if has_gpu and trial:
        raise ValueError("--trial is for machines without a GPU. Leave it out here.")


def run(step: Step, out: Path, *, trial: bool) -> str:
    """Run a step in a process of its own; say how it went, in a word or two."""
    records, logs = out / "records", out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    record = records / f"{step.name}.json"
    record.unlink(missing_ok=True)
    module = f"benchmarks.gpu.steps.{step.module}"
    command = [sys.executable, "-m", module, *step.words.split(), "--name", step.name]
    command += ["--record", str(record), *["--trial"] * trial]
    variables = {
        **os.environ,
        **environment(),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "PYTHONUNBUFFERED": "1",
    }
    with open(logs / f"{step.name}.txt", "w", encoding="utf-8") as log:
        # A session of its own, so that whatever it starts ends with it.
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=variables, cwd=ROOT, start_new_session=True
        )
        try:
            status = process.wait(step.limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    if status is None:
        return f"ended after {step.limit_s} s"
    return "passed" if status == 0 else "failed"


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
