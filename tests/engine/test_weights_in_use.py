"""Scores come from the weights in use, however they came there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from benchmarks.local_model import build_local_model
from tests.engine.conftest import MULTI_HEAD, engine_args
from tests.engine.host import EngineHost
from tests.engine.oracle_answers import OracleAnswers
from tests.engine.probes import generate
from tests.engine.requests import ONE_IMAGE, OTHER_IMAGE, TWO_IMAGES
from vllm_reroute.schedule import RerouteOptions

ROUTED = {"schedule": "pdrop", "tier": 128}
ASKS = (ONE_IMAGE, TWO_IMAGES, OTHER_IMAGE)
ONE_LAYER = ("layers.2.",)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("weights")
    shapes = {"first": MULTI_HEAD, "second": replace(MULTI_HEAD, seed=1)}
    return {name: build_local_model(root / name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def answers(checkpoints: dict[str, Path]) -> OracleAnswers:
    return OracleAnswers(checkpoints)


def decoder_of(llm: Any) -> Any:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.model.routed_decoder


def worst_key(llm: Any) -> float:
    """Largest gap between a scorer's keys and those of the projection that attention uses."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    torch.manual_seed(0)
    gaps, config = [], llm.llm_engine.vllm_config
    with torch.inference_mode(), set_current_vllm_config(config), set_forward_context(None, config):
        for scorer in decoder_of(llm)._scorers.values():
            attention = scorer.attention
            states = torch.randn(8, attention.hidden_size)
            positions = torch.zeros(8, dtype=torch.int64)  # rope turns nothing there
            fused, _ = attention.qkv_proj(scorer.norm(states))
            _, keys, _ = fused.split([attention.q_size, attention.kv_size, attention.kv_size], -1)
            angles = scorer.rotary.angles(positions, states)
            found = scorer._keys(scorer.norm(states), angles).flatten(1)
            gaps.append((found - keys).abs().max().item())
            assert keys.abs().max() > 0
    return max(gaps)


def tensors(checkpoint: Path, parts: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if any(part in name for part in parts):
                    yield name, opened.get_tensor(name)


def reload(llm: Any, **how: Any) -> None:
    """With what vLLM leaves to its callers: nothing computed by the old weights is kept."""
    llm.collective_rpc("reload_weights", kwargs=how)
    llm.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()


def reload_some(llm: Any, checkpoint: Path, parts: tuple[str, ...]) -> None:
    given = list(tensors(checkpoint, parts))
    assert len(given) > 4
    reload(llm, weights_iterator=given)


def check(host: EngineHost, answers: OracleAnswers, checkpoint: str) -> None:
    schedule = RerouteOptions(**ROUTED).resolve(MULTI_HEAD.text_layers)
    for ask, answer in zip(ASKS, host.call(generate, ASKS), strict=True):
        answers.check(checkpoint, schedule, ask, answer)
    assert host.call(worst_key) < 1e-5


def test_reloads(host: EngineHost, checkpoints: dict[str, Path], answers: OracleAnswers) -> None:
    """From disk, of other weights, there and back; then a layer alone, with equal values."""
    host.engine(**engine_args(checkpoints["first"], ROUTED, load_format="auto"))
    check(host, answers, "first")
    for name in ("second", "first"):
        host.call(reload, weights_path=str(checkpoints[name]))
        check(host, answers, name)
    host.call(reload_some, checkpoints["first"], ONE_LAYER)
    check(host, answers, "first")
    host.forget()


def test_dummy_weights_are_scored_with_too(v1: EngineHost, checkpoints: dict[str, Path]) -> None:
    """What vLLM makes up after the weights would have been loaded."""
    v1.engine(**engine_args(checkpoints["first"], ROUTED, load_format="dummy"))
    assert v1.call(worst_key) < 1e-5
    assert [len(answer.token_ids) for answer in v1.call(generate, ASKS)] == [16] * 3
