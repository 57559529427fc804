"""lmms-eval's benchmarks (RefCOCO, POPE, GQA and others) against a running server; no failed request is ever scored.

    python -m benchmarks.quality.lmms_eval --base-url http://127.0.0.1:8000/v1 --model llava-1.5 \\
        --tasks refcoco_bbox_rec_val,pope,gqa --out .local/lmms-eval

Runs in an environment of its own that has lmms-eval (see README.md beside this file). Data sets come from the Hugging
Face hub. Further words are handed to lmms-eval. Answers are kept under --out: after a failure, the same command asks
only what is missing. Exit code 0 means that every request was answered and scored.
"""

import argparse
import os
import sys
from pathlib import Path

MODEL = "checked_openai"
TASKS = "refcoco_bbox_rec_val,pope,gqa"
# A cache of lmms-eval's own would keep what it makes up for failed requests; a token budget makes up answers.
REFUSED = ("--use_cache", "-c", "--max_tokens", "--model_args", "--config")


def main() -> None:
    args, further = parse_arguments()
    try:
        import lmms_eval.__main__ as program
        from lmms_eval.models import MODEL_REGISTRY_V2
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError as error:
        sys.exit(
            f"lmms-eval cannot be imported ({error}). Install it in an environment of its own: "
            "see benchmarks/quality/README.md."
        )
    MODEL_REGISTRY_V2.register_manifest(
        ModelManifest(
            model_id=MODEL,
            chat_class_path="benchmarks.quality.lmms_eval_model.CheckedOpenAI",
        )
    )
    os.environ.setdefault("OPENAI_API_KEY", "none")
    sys.argv = ["lmms-eval", *words(args), *further]
    _, parsed = program.parse_eval_args()
    try:
        # Its own main function prints what is raised and exits with 0.
        results, _ = program.cli_evaluate_single(parsed)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # Below what only says that something was tried again.
            cause = cause.__cause__
        sys.exit(f"lmms-eval did not finish, nothing was scored: {type(cause).__name__}: {cause}")
    print(program.make_table(results))


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.lmms_eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--base-url", required=True, help="the server's OpenAI endpoint, with /v1")
    parser.add_argument("--model", required=True, help="the name it serves")
    parser.add_argument(
        "--tasks", default=TASKS, help=f"lmms-eval's names, by commas (default: {TASKS})"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of answers and results")
    parser.add_argument(
        "--concurrency", type=int, default=32, help="requests under way at once (default: 32)"
    )
    parser.add_argument(
        "--timeout", type=int, default=300, help="seconds one request may take (default: 300)"
    )
    parser.add_argument(
        "--attempts", type=int, default=3, help="attempts at a request in one run (default: 3)"
    )
    args, further = parser.parse_known_args()
    for word in further:
        if word.partition("=")[0] in REFUSED:
            parser.error(
                f"{word} would let lmms-eval score what is no answer, or ask another model. Leave it out."
            )
    if "," in f"{args.base_url}{args.model}{args.out}":
        parser.error(
            "--base-url, --model and --out must not contain a comma: lmms-eval separates by it."
        )
    return args, further


def words(args: argparse.Namespace) -> list[str]:
    """lmms-eval's own words for these arguments."""
    model = {
        "model": args.model,
        "base_url": args.base_url,
        "answers": args.out / "answers.jsonl",
        "num_concurrent": args.concurrency,
        "timeout": args.timeout,
        "max_retries": args.attempts,
    }
    flags = {
        "--model": MODEL,
        "--model_args": ",".join(f"{key}={value}" for key, value in model.items()),
        "--tasks": args.tasks,
        "--output_path": args.out,
    }
    return [*(str(word) for pair in flags.items() for word in pair), "--log_samples"]


if __name__ == "__main__":
    main()
