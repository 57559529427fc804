"""`make bench`: routed engines against stock vLLM, measured in one interleaved run.

Results go to a folder as JSON, Markdown and plots. Finished waves are kept: a run that was cut off goes on where it
stopped, and a later run measures only what is missing. Nothing else should run on the machine meanwhile.

    make bench ARGS="--quick"                          # a trial of every part, numbers mean nothing
    make bench ARGS="--only prefill machinery --rounds 9"
    make bench ARGS="--only serving --fresh"           # measure that part anew
    make bench ARGS="--model FOLDER --dtype bfloat16"  # a checkpoint of yours in LLaVA-1.5's format
    make bench ARGS="--publish"                        # the report of what there is, for the repository
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.bench import device, report
from benchmarks.bench.parts import PARTS
from benchmarks.bench.progress import Progress
from benchmarks.bench.settings import FULL, QUICK, Settings
from benchmarks.bench.store import Store, sources_digest
from benchmarks.long_run import run_to_the_end
from benchmarks.quality.model_shape import fingerprint
from benchmarks.quality.provenance import this_run

OUT = Path(__file__).resolve().parents[2] / ".local" / "bench"
PUBLISHED = Path(__file__).resolve().parents[1] / "results"
ROUNDS, QUICK_ROUNDS = 5, 2


def main() -> None:
    args = parse_arguments()
    run_to_the_end(
        "bench", lambda: not run(args)["not_finished"], started="engine", again="measures"
    )


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """words: the command line's, unless given."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
        help=f"of: {', '.join(PARTS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help=f"counted rounds (default: {ROUNDS})")
    parser.add_argument(
        "--quick", action="store_true", help="a trial on a tiny model; its numbers mean nothing"
    )
    parser.add_argument("--fresh", action="store_true", help="forget finished waves of these parts")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing, write the report of what there is"
    )
    parser.add_argument(
        "--publish", action="store_true",
        help="measure nothing, write the report of what there is to benchmarks/results",
    )  # fmt: skip
    parser.add_argument(
        "--model", type=Path, help="checkpoint folder in LLaVA-1.5's format, instead of seeded ones"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default=device.DTYPE,
        help=f"of all engines (default: {device.DTYPE})",
    )  # fmt: skip
    parser.add_argument(
        "--eager", action=argparse.BooleanOptionalAction, default=device.EAGER,
        help="without torch.compile and CUDA graphs (default: on CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--at-once", type=int, default=device.engines_at_once(),
        help="engines that fit memory side by side (default: by main memory, %(default)s here)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of results (default: .local/bench)")
    parser.add_argument(
        "--start-limit", type=float, default=900, help="seconds an engine may take to answer"
    )
    args = parser.parse_args(words)
    if args.publish and args.quick:
        parser.error("--publish is not for --quick: a trial's numbers mean nothing.")
    if args.rounds is None:
        args.rounds = QUICK_ROUNDS if args.quick else ROUNDS
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} must be 1 or more.")
    if args.at_once < device.LEAST_AT_ONCE:
        parser.error(
            f"--at-once {args.at_once} must be 3 or more: two stock engines and a routed one."
        )
    if args.out is None:
        args.out = OUT / "quick" if args.quick else OUT
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(
        sizes=QUICK if args.quick else FULL,
        folder=args.out,
        model=args.model,
        dtype=args.dtype,
        eager=args.eager,
        rounds=args.rounds,
        at_once=args.at_once,
        start_limit_s=args.start_limit,
    )


def run(args: argparse.Namespace) -> dict:
    """Measures what is missing, writes the report, and returns its content."""
    os.environ.update(device.environment())
    settings = settings_of(args)
    kept = Store(settings.folder / "waves", identity_of(settings))
    only_report = args.report or args.publish
    not_finished = {} if only_report else measure_parts(args.only, settings, kept, args.fresh)
    found = report.collect(kept.folder) | {"not_finished": not_finished}
    folder = PUBLISHED if args.publish else settings.folder
    paths = report.write(found, folder)
    print((folder / report.MARKDOWN_NAME).read_text(encoding="utf-8"))
    print("Written: " + ", ".join(str(path) for path in paths), file=sys.stderr)
    return found


def identity_of(settings: Settings) -> dict:
    return {
        **settings.identity(),
        "weights": fingerprint(settings.model) if settings.model else None,
        "device": device.name(),
        "threads": device.threads(),
        "sources": sources_digest(),
    }


def measure_parts(
    names: Sequence[str], settings: Settings, kept: Store, fresh: bool
) -> dict[str, str]:
    """Measures all waves that are not finished; returns those that could not be, and why.

    Raises ValueError, before anything starts, if a finished wave was measured with something else.
    """
    progress = Progress(0)
    waves: dict[str, Callable[[], dict]] = {}
    for name in names:
        for wave, measure in PARTS[name].waves(settings, progress).items():
            waves[f"{name}.{wave}"] = measure
    progress.expect(len(waves))
    not_finished = {}
    try:
        for wave in waves:
            if fresh:
                kept.forget(wave)
            kept.wave(wave)
        for wave, measure in waves.items():
            progress.begin(wave)
            try:
                kept.measured(wave, this_run(), measure)
            except (RuntimeError, OSError) as error:
                progress.note(f"{wave} was not measured: {error}")
                # Lines above the last one name files of this machine.
                not_finished[wave] = str(error).strip().splitlines()[-1]
            progress.finish()
    finally:
        progress.close()
    return not_finished


if __name__ == "__main__":
    main()
