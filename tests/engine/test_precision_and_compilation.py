"""bf16, torch.compile and tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.engine.conftest import engine_args
from tests.engine.host import EngineHost
from tests.engine.oracle_answers import OracleAnswers
from tests.engine.probes import generate
from tests.engine.requests import MIXED
from tests.oracle import RoutedOracle
from vllm_reroute.config import RerouteOptions

OPTIONS: dict[str, Any] = {"layers": [2, 4, 6], "keep": [0.5, 0.25, 0.4]}
SCHEDULE = RerouteOptions.from_mapping(OPTIONS).resolve(8)
BF16_TOLERANCE = 0.35
"""Eight mantissa bits through eight layers of random weights; measured on the dense model too."""


def num_compiled_stages(llm: Any) -> int:
    from vllm.compilation.counter import compilation_counter

    return compilation_counter.num_models_seen


@pytest.fixture
def fresh_v1() -> Iterator[EngineHost]:
    host = EngineHost({"VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    yield host
    host.close()


def test_compiled_stages_agree_with_oracle(
    fresh_v1: EngineHost, models: Any, oracles: OracleAnswers
) -> None:
    fresh_v1.engine(**engine_args(models["grouped"], OPTIONS, enforce_eager=False))
    # The stock model class counts once more, but is never called.
    assert fresh_v1.call(num_compiled_stages) >= len(SCHEDULE.stages)
    for ask, answer in zip(MIXED, fresh_v1.call(generate, MIXED), strict=True):
        oracles.check("grouped", SCHEDULE, ask, answer)


def test_tensor_parallel_agrees_with_oracle(models: Any, oracles: OracleAnswers) -> None:
    """Two ranks choose alike. Workers are processes of their own, so decisions are not recorded."""
    host = EngineHost({"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    try:
        host.engine(**engine_args(models["grouped"], OPTIONS, tensor_parallel_size=2))
        for ask, answer in zip(MIXED, host.call(generate, MIXED), strict=True):
            expected = oracles.result("grouped", SCHEDULE, ask, answer.prompt_token_ids)
            assert answer.token_ids == expected.token_ids
    finally:
        host.close()


def test_bf16_stays_close_to_oracle(v1: EngineHost, models: Any) -> None:
    """Along the engine's own tokens, the oracle in bf16 gives nearly the same log-probabilities."""
    options = {"schedule": "pdrop", "tier": 192}
    schedule = RerouteOptions.from_mapping(options).resolve(8)
    oracle = RoutedOracle(
        models["grouped"],
        action=schedule.action,
        layers=schedule.layers,
        keep=schedule.keep,
        dtype=torch.bfloat16,
    )
    v1.engine(**engine_args(models["grouped"], options, dtype="bfloat16"))
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(models["grouped"])
    asks = [ask for ask in MIXED if ask.images]
    for ask, answer in zip(asks, v1.call(generate, asks), strict=True):
        pixels = processor.image_processor(ask.pictures(), return_tensors="pt")["pixel_values"]
        result = oracle.run(
            answer.prompt_token_ids, pixels, ask.max_tokens, forced_token_ids=answer.token_ids
        )
        errors = [
            abs(logprob - result.logprobs[step, token].item())
            for step, logprobs in enumerate(answer.logprobs)
            for token, logprob in logprobs.items()
        ]
        print(f"bf16: {max(errors):.3f} at most, {sum(errors) / len(errors):.4f} on average")
        assert max(errors) < BF16_TOLERANCE
