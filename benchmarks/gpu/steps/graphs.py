"""The same batches eagerly and with CUDA graphs: the answers must not differ.

Batches of 1, 3, 5 and 11 requests, so that decode steps are padded; prompts that are chunked, so that
image prefills, text prefills and decodes meet in one step.
"""

import argparse
import gc
from dataclasses import replace
from typing import Any

from benchmarks.gpu.engine import build, in_use
from benchmarks.gpu.record import Record, run_step

SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
BATCHES = (1, 3, 5, 11)
OPTIONS = {"schedule": "pdrop", "tier": 64}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", choices=("decode", "piecewise"), default="decode")
    return parser


def main(args: argparse.Namespace, record: Record) -> None:
    compilation: dict[str, Any] = {"cudagraph_capture_sizes": SIZES}
    if args.graphs == "decode":
        compilation |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    eager = answers(args, record, "eager", {"enforce_eager": True})
    graphs = answers(args, record, "graphs", {"compilation_config": compilation})
    captured = args.trial or record.values["graphs"]["full_graphs_captured"] > 0
    tokens = sum(a["tokens"] == b["tokens"] for a, b in zip(eager, graphs, strict=True))
    decisions = sum(a["kept"] == b["kept"] for a, b in zip(eager, graphs, strict=True))
    # A compiled model rounds otherwise in bf16: a few answers may leave the eager ones' path.
    least = len(eager) if args.graphs == "decode" else 0.9 * len(eager)
    record.put(
        requests=len(eager),
        same_tokens=tokens,
        same_decisions=decisions,
        first_logprob_gap=max(
            abs(a["logprob"] - b["logprob"]) for a, b in zip(eager, graphs, strict=True)
        ),
        passed=captured and min(tokens, decisions) >= least,
    )


def answers(args: argparse.Namespace, record: Record, name: str, how: dict) -> list[dict]:
    """Of one engine, which is gone afterwards."""
    from benchmarks.grounding.evaluate import MODEL
    from tests.engine.probes import generate
    from tests.engine.requests import SceneAsk

    llm = build(
        MODEL, OPTIONS, trial=args.trial, dtype="bfloat16", max_model_len=512,
        max_num_batched_tokens=256, max_num_seqs=32, kv_cache_memory_bytes=256 * 2**20,
        limit_mm_per_prompt={"image": 2}, **how,
    )  # fmt: skip
    record.put(**{name: in_use(llm)})
    found = []
    for size in BATCHES[:2] if args.trial else BATCHES:
        # Of different lengths: that is how their decisions are told apart.
        asks = [
            replace(ask, text="x " * i + ask.text, max_tokens=12 + i)
            for i, ask in enumerate(map(SceneAsk.about, range(size)))
        ]
        found += [
            {
                "tokens": answer.token_ids,
                "kept": answer.selected,
                "logprob": max(answer.logprobs[0].values()),
            }
            for answer in generate(llm, asks)
        ]
    del llm
    gc.collect()
    release()
    return found


def release() -> None:
    """Give back what an engine held, for the next one of this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    run_step(arguments(), main)
