"""`make quality`: how well dense, routed and downsampled servers answer the same questions, at matched budgets.

Every configuration is a real `vllm serve` on loopback, asked over HTTP. Results go to a folder as JSON, Markdown and
plots. A run that was cut off goes on where it stopped. With --base-url a server of your own is asked instead.

    make quality ARGS="--quick"
    make quality ARGS="--publish"    # the report of what there is, for the repository
    make quality ARGS="--only dense 'fastv remove' 'fastv reroute' --budgets 33 11"
    make quality ARGS="--base-url http://127.0.0.1:8000/v1 --model llava-1.5 --label 'llava-1.5 pdrop 64'"
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.grounding.questions import questions
from benchmarks.grounding.recipe import kinds_of
from benchmarks.long_run import run_to_the_end
from benchmarks.quality import report
from benchmarks.quality.asking import Endpoint, Prompt, prompts_of
from benchmarks.quality.methods import CALIBRATED, METHODS, Configuration, configurations
from benchmarks.quality.model_shape import DEFAULT_MODEL, ModelShape, fingerprint
from benchmarks.quality.results import results, rows_in
from benchmarks.quality.run import SPLIT, run, run_own_server
from benchmarks.quality.run_arguments import (
    add_run_arguments,
    check_counts,
    outcomes_in,
    show_report,
)
from benchmarks.quality.serving import Serving

PUBLISHED = Path(__file__).resolve().parents[1] / "results"
QUESTIONS, QUICK_QUESTIONS = 1000, 36


def main() -> None:
    args = parse_arguments()
    run_to_the_end("quality", lambda: measure(args), started="server", again="asks")


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """words: the command line's, unless given."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        help="LLaVA-1.5-format folder (default: the grounding model); with --base-url, the name served there",
    )
    parser.add_argument("--questions", type=int, help=f"how many (default: {QUESTIONS})")
    parser.add_argument(
        "--quick", action="store_true", help=f"a trial with {QUICK_QUESTIONS} questions"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="METHOD",
        help=f"of: {', '.join(METHODS)} (default: all, calibrated ones for the grounding model alone)",
    )
    add_run_arguments(
        parser,
        name="quality",
        published="benchmarks/results",
        images="image's",
        at_once="requests under way",
        concurrency=32,
    )
    own = parser.add_argument_group("a server of your own, asked instead of starting any")
    own.add_argument(
        "--base-url",
        help="its OpenAI endpoint, such as http://127.0.0.1:8000/v1; OPENAI_API_KEY is sent",
    )
    own.add_argument("--label", help="its name in the report")
    own.add_argument(
        "--visual-tokens",
        type=float,
        metavar="AVG",
        help="its average per decoder layer, to be in the plot",
    )
    args = parser.parse_args(words)
    if args.publish and (args.quick or args.fresh or args.base_url):
        parser.error(
            "--publish reports a full run that is there; give it without --quick, --fresh and --base-url."
        )
    if args.questions is None:
        args.questions = QUICK_QUESTIONS if args.quick else QUESTIONS
    check_counts(parser, args, ("questions", "concurrency"))
    if args.base_url is None:
        for name in ("label", "visual_tokens"):
            if getattr(args, name) is not None:
                parser.error(
                    f"--{name.replace('_', '-')} is for a server of your own. Add --base-url."
                )
    elif args.model is None or args.label is None:
        parser.error(
            "--base-url needs --model, the name served there, and --label, its name in the report."
        )
    return args


def measure(args: argparse.Namespace) -> bool:
    """Asks, writes the report, and says whether everything wanted has an answer."""
    outcomes = outcomes_in(args.out, fresh=args.fresh)
    # What a model cannot serve is refused before pictures are rendered.
    plan = None if args.base_url else planned(args)
    model = DEFAULT_MODEL if args.base_url or not args.model else Path(args.model)
    prompts = prompts_of(questions(SPLIT, args.questions, kinds_of(model)))
    not_run = {} if args.publish else ask(args, plan, prompts, outcomes)
    digests = [prompt.digest for prompt in prompts]
    found = results(rows_in(outcomes, digests), digests, not_run)
    ours = model.resolve() == DEFAULT_MODEL
    published = PUBLISHED if ours else PUBLISHED / model.name
    folder = published if args.publish else args.out
    paths = report.write(found, folder)
    show_report(folder / report.MARKDOWN_NAME, paths)
    return found["complete"]


def planned(args: argparse.Namespace) -> tuple[Path, ModelShape, list[Configuration]]:
    """The model to serve, its shape, and the servers to ask."""
    model = Path(args.model) if args.model else DEFAULT_MODEL
    shape = ModelShape.of(model)
    # Calibrated schedules are those of one model.
    ours = model.resolve() == DEFAULT_MODEL
    methods = args.only or [name for name in METHODS if ours or name not in CALIBRATED]
    return model, shape, configurations(methods, [each / 100 for each in args.budgets], shape)


def ask(
    args: argparse.Namespace,
    plan: tuple[Path, ModelShape, list[Configuration]] | None,
    prompts: Sequence[Prompt],
    outcomes: Path,
) -> dict[str, str]:
    """Asks what is missing; returns the configurations that could not be asked, and why.

    plan: None for a server of the user's own.
    """
    if plan is None:
        key = os.environ.get("OPENAI_API_KEY", "none")
        endpoint = Endpoint(url=args.base_url, model=args.model, api_key=key)
        own = (endpoint, args.label, args.visual_tokens)
        run_own_server(*own, prompts, args.concurrency, outcomes)
        return {}
    model, shape, wanted = plan
    serving = Serving(
        model=model,
        shape=shape,
        folder=args.out,
        dtype=args.dtype,
        concurrency=args.concurrency,
        start_limit_s=args.start_limit,
    )
    return run(wanted, prompts, serving, fingerprint(model), outcomes)


if __name__ == "__main__":
    main()
