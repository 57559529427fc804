"""`vllm-reroute calibrate`: the words of its command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from vllm_reroute.schedule.budget import REFERENCE_VISUAL_TOKENS
from vllm_reroute.schedule.options import DEFAULT_ACTION
from vllm_reroute.schedule.published import ACTIONS

EXAMPLE = "vllm-reroute calibrate --model llava-1.5 --samples samples.jsonl --budget 192 --out calibrated.json"
MOST_DECISIONS = 4
OBJECTIVES = ("lasting", "contribution", "attention")

DEFAULT_OBJECTIVE = {"reroute": "lasting", "remove": "contribution"}
"""What is removed is missing in later layers' own rows; what is skipped comes back as it was."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_calibrate(commands: argparse._SubParsersAction) -> None:
    """Add the command; importing this needs no torch."""
    parser = commands.add_parser(
        "calibrate",
        help="choose the schedule that loses least on your model and your questions",
        description="Run sample questions dense once on plain transformers, record one row of "
        "attention per decoder layer, and choose decision layers and keep ratios that lose the least "
        "of it at a budget. docs/calibrate.md is the guide.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("--model", required=True, help="model id, local folder or short name")
    parser.add_argument(
        "--samples",
        type=Path,
        required=True,
        help="JSONL of questions with pictures, 20 to 200 of them, in the format of vllm bench "
        "serve's custom_image data set",
    )
    parser.add_argument(
        "--budget",
        type=_share,
        required=True,
        metavar="AVG",
        help=f"average visual tokens per layer for a {REFERENCE_VISUAL_TOKENS}-token image, as "
        "--reroute-budget; or a share, such as 33%%",
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write, ending in .json")
    parser.add_argument(
        "--stages",
        type=_positive,
        default=MOST_DECISIONS,
        metavar="N",
        help=f"decisions at most (default: {MOST_DECISIONS})",
    )
    parser.add_argument(
        "--action",
        choices=ACTIONS,
        default=DEFAULT_ACTION,
        help=f"whether deferred tokens may come back (default: {DEFAULT_ACTION})",
    )
    parser.add_argument(
        "--monotone",
        action="store_true",
        help="let no stage keep more than the one before it; removal is so in any case",
    )
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="what a token that does not run is worth: the last prompt token's attention to it; what "
        "it adds to that token's stream (default with remove); or that now and, as far as the layer "
        "changes it, later (default with reroute)",
    )
    parser.add_argument("--no-plot", action="store_true", help="leave the plot out")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the checkpoint's")
    parser.add_argument("--device", help="such as cuda:1 (default: a GPU if there is one)")
    parser.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> Iterator[str]:
    import torch

    from vllm_reroute.calibration.run import Settings, calibrate

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return calibrate(
        Settings(
            model=args.model,
            samples=args.samples,
            share=args.budget,
            most_decisions=args.stages,
            action=args.action,
            monotone=args.monotone,
            objective=args.objective or DEFAULT_OBJECTIVE[args.action],
            out=args.out,
            plot=not args.no_plot,
            dtype=args.dtype,
            device=device,
        )
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _share(text: str) -> float:
    """A number of the reference image's tokens or a percentage, as a share."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number nor a percentage, such as 192 or 33%"
        ) from None
    share = number / 100 if text.endswith("%") else number / REFERENCE_VISUAL_TOKENS
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(
            f"{text} must lie between 0 and {REFERENCE_VISUAL_TOKENS}, or between 0% and 100%"
        )
    return share
