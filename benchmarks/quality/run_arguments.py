"""What runs over HTTP have in common on the command line, and before and after they ask."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

BUDGETS = (33, 22, 11, 5)
LOCAL = Path(__file__).resolve().parents[2] / ".local"


def add_run_arguments(
    parser: argparse.ArgumentParser,
    *,
    name: str,
    published: str,
    images: str,
    at_once: str,
    concurrency: int,
) -> None:
    """name: of the folder in .local. published, images, at_once: words of the help texts. concurrency: default."""
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=float,
        default=BUDGETS,
        metavar="PERCENT",
        help=f"average visual tokens per decoder layer, in percent of the {images} (default: "
        f"{' '.join(map(str, BUDGETS))})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=LOCAL / name,
        help=f"folder of outcomes and report (default: .local/{name})",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="forget the outcomes that are in --out"
    )
    parser.add_argument(
        "--publish",
        action="store_true",
        help=f"ask nothing, write the report of what is in --out to {published}",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=concurrency,
        help=f"{at_once} at once (default: {concurrency})",
    )
    parser.add_argument(
        "--dtype", default="float32", help="of the servers started here (default: float32)"
    )
    parser.add_argument(
        "--start-limit", type=float, default=600, help="seconds a server may take to start"
    )


def check_counts(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: Iterable[str]
) -> None:
    """Ends with an error for one that is below 1."""
    for name in names:
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be 1 or more.")


def outcomes_in(out: Path, *, fresh: bool) -> Path:
    """The folder of outcomes; fresh: forgets those that are there."""
    outcomes = out / "outcomes"
    if fresh:
        for path in outcomes.glob("*.jsonl"):
            path.unlink()
    return outcomes


def show_report(report: Path, written: Iterable[Path]) -> None:
    """Prints the report, and which files there are."""
    print(report.read_text(encoding="utf-8"))
    print("Written: " + ", ".join(str(path) for path in written), file=sys.stderr)
