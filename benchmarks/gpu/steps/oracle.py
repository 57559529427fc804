"""The small trained LLaVA, routed on the real kernels, against plain transformers.

In fp32 tokens, decisions and log-probabilities have to be equal; in bf16 two tokens nearly alike may
change places, so tokens have to be equal and decisions are reported. Also looks for waits.
"""

import argparse
import os
import warnings
from typing import Any

from benchmarks.gpu.engine import BACKENDS, build, in_use
from benchmarks.gpu.record import Record, run_step

DEPTH = 32
TOLERANCE = 2e-3


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--backend", choices=BACKENDS, default="TRITON_ATTN")
    parser.add_argument("--schedule", default="pdrop")
    parser.add_argument("--action", default="reroute")
    parser.add_argument("--tier", type=int, default=64)
    return parser


def main(args: argparse.Namespace, record: Record) -> None:
    if args.dtype == "float32":
        # Triton's tl.dot would round fp32 to tf32.
        os.environ["TRITON_F32_DEFAULT"] = "ieee"
    import torch
    from transformers import AutoProcessor

    from benchmarks.grounding.evaluate import MODEL
    from tests.engine.probes import generate, generate_one_by_one
    from tests.engine.requests import SCENES
    from tests.oracle import RoutedOracle
    from vllm_reroute.schedule import RerouteOptions

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    options = {"schedule": args.schedule, "action": args.action, "tier": args.tier}
    llm = build(
        MODEL, options, trial=args.trial, dtype=args.dtype, attention_backend=args.backend,
        enforce_eager=True, max_model_len=512, max_num_batched_tokens=600, max_num_seqs=16,
        kv_cache_memory_bytes=64 * 2**20, limit_mm_per_prompt={"image": 2},
    )  # fmt: skip
    record.put(engine=in_use(llm))
    asks = SCENES[:3] if args.trial else SCENES
    together, alone = generate(llm, asks), generate_one_by_one(llm, asks)
    if not args.trial:
        record.put(waits=waits(llm, asks[0]))
    schedule = RerouteOptions.from_mapping(options).resolve(DEPTH)
    oracle = RoutedOracle(MODEL, action=args.action, layers=schedule.layers, keep=schedule.keep)
    processor = AutoProcessor.from_pretrained(MODEL)
    rows = []
    for ask, one, many in zip(asks, alone, together, strict=True):
        want = oracle.run(ask.inputs(processor), ask.max_tokens)
        rows.append(compared(ask, one, many, want))
    tokens = all(row["tokens_alone"] and row["tokens_together"] for row in rows)
    decisions = all(row["decisions"] for row in rows)
    worst = max(row["logprob_gap"] for row in rows)
    exact = args.dtype == "float32" or args.trial
    record.put(
        requests=rows,
        tokens_equal=tokens,
        decisions_equal=decisions,
        worst_logprob_gap=worst,
        passed=tokens and (not exact or (decisions and worst < TOLERANCE)),
    )


def compared(ask: Any, one: Any, many: Any, want: Any) -> dict:
    """An answer alone and in a batch beside the oracle's."""
    gaps = [
        abs(logprob - float(want.logprobs[step, token]))
        for step, logprobs in enumerate(one.logprobs)
        for token, logprob in logprobs.items()
    ]
    same = one.token_ids == want.token_ids
    return {
        "tokens_alone": same,
        "tokens_together": many.token_ids == want.token_ids,
        "decisions": not ask.visual or one.selected == want.selected == many.selected,
        "logprob_gap": max(gaps) if same else float("inf"),
    }


def waits(llm: Any, ask: Any) -> list[str]:
    """Where the decoder or the planner waits for the device, by CUDA's own warnings."""
    import torch

    from vllm_reroute.routing.decoder import RoutedDecoder
    from vllm_reroute.runners.step_planner import StepPlanner

    found: set[str] = set()

    def watching(owner: type, name: str) -> Any:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    return original(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                found.update(
                    f"{name}: {warning.filename}:{warning.lineno}"
                    for warning in seen
                    if "synchroniz" in str(warning.message)
                )

        setattr(owner, name, watched)
        return original

    places = (RoutedDecoder, "forward"), (StepPlanner, "plan")
    originals = [watching(*place) for place in places]
    try:
        llm.generate([ask.prompt()], ask.sampling_params(), use_tqdm=False)
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
    return sorted(found)


if __name__ == "__main__":
    run_step(arguments(), main)
