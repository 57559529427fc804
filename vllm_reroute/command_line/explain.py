"""`vllm-reroute explain`: pictures and a page of what routing did to one request."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_reroute.families.short_names import resolve_model
from vllm_reroute.schedule.options import RerouteOptions
from vllm_reroute.startup.flags import add_reroute_flags, options_from_flags

EXAMPLE = (
    'vllm-reroute explain --model llava-1.5 --image cat.jpg --question "What is this?" '
    "--reroute-schedule pdrop --out explained"
)
DEFAULT_MAX_TOKENS = 64
DEFAULT_FRAMES = 8


def add_explain(commands: argparse._SubParsersAction) -> None:
    """Add the command. Words it does not know are engine flags: `run(args, words)`."""
    parser = commands.add_parser(
        "explain",
        help="ask one question about pictures, and draw what every stage kept of them",
        description="Ask a routed and then a stock engine the same question, greedily, and leave a "
        "page (index.html), a sheet and a picture per stage. Further flags are vLLM's own engine "
        "flags, such as --dtype float32 or --max-model-len 4096, for both engines.",
        epilog=f"example: {EXAMPLE}",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="model id, local folder or short name")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE",
        help="a picture to ask about; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--video", type=Path, action="append", default=[], metavar="FILE",
        help="a video to ask about, after the images in the prompt; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--frames", type=int, default=DEFAULT_FRAMES, metavar="N",
        help=f"frames taken of each video, evenly (default: {DEFAULT_FRAMES})",
    )  # fmt: skip
    parser.add_argument("--question", required=True, help="what to ask")
    parser.add_argument(
        "--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, metavar="N",
        help=f"longest answer (default: {DEFAULT_MAX_TOKENS})",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER",
        help="where to leave it: a new folder, or an earlier explanation to replace",
    )  # fmt: skip
    add_reroute_flags(parser)
    parser.set_defaults(run_with_engine_flags=run_explain)


def run_explain(args: argparse.Namespace, engine_flags: Sequence[str]) -> Iterator[str]:
    """Lines that say what was left where. Raises ValueError for what cannot be explained."""
    options = RerouteOptions.from_mapping(options_from_flags(args))
    if not options.active:
        raise ValueError(f"nothing to explain: give --reroute-schedule. Example: {EXAMPLE}")
    if not args.image and not args.video:
        raise ValueError(f"nothing to look at: give --image or --video. Example: {EXAMPLE}")
    for name in ("frames", "max_tokens"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(args, name)} must be 1 or more.")

    from vllm_reroute.explain.explanation import explain
    from vllm_reroute.explain.folder import check_folder, write_folder
    from vllm_reroute.explain.pictures import load_image, load_video
    from vllm_reroute.explain.question import Question
    from vllm_reroute.explain.wording import stage_counts, stage_title, summary

    # Before minutes are spent on engines.
    check_folder(args.out)
    pictures = [load_image(path) for path in args.image]
    pictures += [load_video(path, args.frames) for path in args.video]
    question = Question(
        model=resolve_model(args.model),
        text=args.question,
        pictures=tuple(pictures),
        max_tokens=args.max_tokens,
        engine_flags=tuple(engine_flags),
    )
    explanation = explain(question, options, say=_say)
    page, sheet, *stages = write_folder(explanation, args.out)
    yield summary(explanation)
    for index, stage in enumerate(explanation.stages):
        yield f"  {stage_title(index, stage)}: {stage_counts(explanation, stage)}"
    yield f"routed  {explanation.routed_answer}"
    yield f"dense   {explanation.dense_answer}"
    yield f"page    {page}"
    yield f"sheet   {sheet}"
    yield f"stages  {stages[0]} to {stages[-1].name}"


def _say(what: str) -> None:
    print(f"vllm-reroute: {what} (it is started for this, a while)", file=sys.stderr, flush=True)
