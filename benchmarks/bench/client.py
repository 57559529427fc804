"""`vllm bench serve`, in a process that stays: importing it takes longer than most of its runs."""

from pathlib import Path

METRICS = ("ttft", "tpot")
RATE = "request_throughput"
KEYS = (RATE, *(f"{percentile}_{metric}_ms" for metric in METRICS for percentile in ("p50", "p99")))


def command(
    url: str, model: Path, served: str, image_size: int, requests: int, at_once: int,
    answer_tokens: int, seed: int,
) -> list[str]:  # fmt: skip
    """Words of `vllm bench serve`: new random images and texts for every seed, the same for every server."""
    flags = {
        "--backend": "openai-chat",
        "--base-url": url,
        "--endpoint": "/v1/chat/completions",
        "--model": model,
        "--served-model-name": served,
        "--dataset-name": "random-mm",
        "--random-input-len": 48,
        "--random-output-len": answer_tokens,
        "--random-mm-base-items-per-request": 1,
        "--random-mm-limit-mm-per-prompt": '{"image": 1, "video": 0}',
        "--random-mm-bucket-config": f"{{({image_size}, {image_size}, 1): 1.0}}",
        "--num-prompts": requests,
        "--max-concurrency": at_once,
        "--temperature": 0,
        "--percentile-metrics": ",".join(METRICS),
        "--metric-percentiles": "50,99",
        "--seed": seed,
    }
    return [str(word) for pair in flags.items() for word in pair] + ["--disable-tqdm"]


def bench_serve(state: dict, words: list[str]) -> dict:
    """Runs the command and returns what it measured. RuntimeError if any request failed."""
    import asyncio

    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    args = parser.parse_args(words)
    found = asyncio.run(main_async(args))
    if found["completed"] != args.num_prompts:
        raise RuntimeError(f"{found['completed']} of {args.num_prompts} requests were answered.")
    return {key: found[key] for key in KEYS}
