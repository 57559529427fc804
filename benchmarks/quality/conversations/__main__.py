"""What `--reroute-history` does to answers: the same conversations with stock, rerouting and removing servers.

Every server is a real `vllm serve` on loopback, asked over HTTP. Results go to a folder as JSON, Markdown and a plot. A
run that was cut off goes on where it stopped.

    python -m benchmarks.quality.conversations
    python -m benchmarks.quality.conversations --quick
    python -m benchmarks.quality.conversations --publish    # the report of what there is, for the repository
    python -m benchmarks.quality.conversations --only 'reroute rerank' 'reroute keep' --budgets 33 22
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.grounding.conversations import conversations
from benchmarks.grounding.evaluate_talks import MODEL
from benchmarks.long_run import run_to_the_end
from benchmarks.quality.conversations import report
from benchmarks.quality.conversations.rows import METHODS, PICTURES, rows, run
from benchmarks.quality.conversations.table import table
from benchmarks.quality.conversations.talking import talks_of, turns_of
from benchmarks.quality.model_shape import ModelShape, fingerprint
from benchmarks.quality.run import SPLIT
from benchmarks.quality.run_arguments import (
    add_run_arguments,
    check_counts,
    outcomes_in,
    show_report,
)
from benchmarks.quality.serving import Serving

PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "conversations"
TALKS, QUICK_TALKS = 1000, 12


def main() -> None:
    args = parse_arguments()
    run_to_the_end("conversations", lambda: measure(args), started="server", again="asks")


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """words: the command line's, unless given."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.conversations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=MODEL,
        help="LLaVA-1.5-format folder (default: the model that learnt to converse)",
    )
    parser.add_argument("--talks", type=int, help=f"conversations (default: {TALKS})")
    parser.add_argument(
        "--quick", action="store_true", help=f"a trial with {QUICK_TALKS} conversations"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="SERVER", help=f"of: {', '.join(METHODS)} (default: all)"
    )
    add_run_arguments(
        parser,
        name="conversations",
        published="benchmarks/results/conversations",
        images="pictures'",
        at_once="conversations held",
        concurrency=64,
    )
    args = parser.parse_args(words)
    if args.publish and (args.quick or args.fresh):
        parser.error(
            "--publish reports a full run that is there; give it without --quick and --fresh."
        )
    if args.talks is None:
        args.talks = QUICK_TALKS if args.quick else TALKS
    check_counts(parser, args, ("talks", "concurrency"))
    return args


def measure(args: argparse.Namespace) -> bool:
    """Asks, writes the report, and says whether everything wanted has an answer."""
    outcomes = outcomes_in(args.out, fresh=args.fresh)
    shape = ModelShape.of(args.model)
    wanted = rows(args.only or list(METHODS), [each / 100 for each in args.budgets], shape)
    talks = talks_of(conversations(SPLIT, args.talks))
    not_run: dict[str, str] = {}
    if not args.publish:
        serving = Serving(
            model=args.model,
            shape=shape,
            folder=args.out,
            dtype=args.dtype,
            concurrency=args.concurrency,
            start_limit_s=args.start_limit,
            pictures=PICTURES,
            prefix_cache=True,
        )
        not_run = run(wanted, talks, serving, fingerprint(args.model), outcomes)
    found = table(outcomes, turns_of(talks), len(talks), not_run)
    folder = PUBLISHED if args.publish else args.out
    paths = report.write(found, folder)
    show_report(folder / report.MARKDOWN_NAME, paths)
    return found["complete"]


if __name__ == "__main__":
    main()
