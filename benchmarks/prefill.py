"""Prefill and decode time of routed engines against stock vLLM, in one interleaved run.

    python -m benchmarks.prefill [--rounds 7]

Every configuration is an engine in a process of its own; all of them answer the same request in
turn, round after round, so that a change of the machine's speed meets them alike. Quoted are medians
of the ratio to stock vLLM in the same round, with the range. The model is a seeded one of 32 layers,
hidden size 512, and 576 visual tokens, in fp32, eager, with blocks of 32 tokens.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.local_model import DEMO, MODELS, build_local_model
from benchmarks.photos import photo
from vllm_reroute.config import RerouteOptions

WIDE = replace(
    DEMO,
    hidden_size=512,
    heads=8,
    kv_heads=8,
    intermediate_size=1376,
    vision_layers=2,
    vision_hidden_size=64,
    vision_heads=2,
)
TEXT_TOKENS = 104
PROMPT = "USER: <image>\n" + "First count what lies above, below and inside. " * 8 + "ASSISTANT:"
DECODE_TOKENS = 16
CONFIGURATIONS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "keep all (machinery only)": {
        "layers": [3, 7, 15, 23],
        "keep": [0.9999, 0.9998, 0.9997, 0.9996],
    },
    "fastv remove 192": {"schedule": "fastv", "action": "remove", "tier": 192},
    "fastv reroute 192": {"schedule": "fastv", "action": "reroute", "tier": 192},
    "pdrop reroute 192": {"schedule": "pdrop", "action": "reroute", "tier": 192},
    "fastv remove 64": {"schedule": "fastv", "action": "remove", "tier": 64},
    "fastv reroute 64": {"schedule": "fastv", "action": "reroute", "tier": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds (default: 7)")
    rounds = parser.parse_args().rounds
    model = str(build_local_model(MODELS / "wide-llava", WIDE))
    context = get_context("spawn")
    engines: dict[str, Connection] = {}
    for number, (name, options) in enumerate(CONFIGURATIONS.items(), 1):
        say(f"starting engine {number} of {len(CONFIGURATIONS)}: {name}")
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, model, options), daemon=True).start()
        ours.recv()
        engines[name] = ours
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}" + (", discarded" if number == 0 else ""))
        for name, engine in engines.items():
            engine.send("run")
            measured = engine.recv()
            if number:
                times[name].append(measured)
    for engine in engines.values():
        engine.send("stop")
    print("\n".join(table(times)))


def table(times: dict[str, list[tuple[float, float]]]) -> list[str]:
    """A Markdown table: speed relative to stock vLLM, median and range over the rounds."""
    lines = [
        "| configuration | prefill speed-up | decoder's limit | decode step, time / stock |",
        "|---|---|---|---|",
    ]
    for name, own in times.items():
        prefill = [stock[0] / mine[0] for stock, mine in zip(times["stock"], own, strict=True)]
        decode = [mine[1] / stock[1] for stock, mine in zip(times["stock"], own, strict=True)]
        lines.append(f"| {name} | {spread(prefill)} | {limit(name):.2f} | {spread(decode)} |")
    return lines


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def limit(name: str) -> float:
    """Layer·token products of stock over routed: what a decoder without any overhead would reach."""
    options, dense = CONFIGURATIONS[name], WIDE.visual_tokens + TEXT_TOKENS
    if options is None:
        return 1.0
    schedule = RerouteOptions.from_mapping(options).resolve(WIDE.text_layers)
    return dense / (TEXT_TOKENS + schedule.average(WIDE.visual_tokens))


def serve(connection: Connection, model: str, options: dict[str, Any] | None) -> None:
    """One engine; answers each "run" with (prefill seconds, seconds per decode step)."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Engines that run in turn may all use all cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    os.environ.update(environment)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        block_size=32,
        kv_cache_memory_bytes=256 * 2**20,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        additional_config={"reroute": options} if options else {},
    )
    picture = photo("astronaut").image
    prompt = {"prompt": PROMPT, "multi_modal_data": {"image": picture}}

    def seconds(num_tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        started = time.perf_counter()
        llm.generate([prompt], params, use_tqdm=False)
        return time.perf_counter() - started

    connection.send("ready")
    while connection.recv() == "run":
        prefill = seconds(1)
        connection.send((prefill, (seconds(1 + DECODE_TOKENS) - prefill) / DECODE_TOKENS))


def say(line: str) -> None:
    """A line of progress, apart from the results on standard output."""
    print(f"[prefill] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
