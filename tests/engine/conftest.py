"""Engines and models shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.grounding.evaluate import MODEL
from benchmarks.local_model import TINY, LlavaShape, build_local_model
from tests.engine.host import V2_ENVIRONMENT, EngineHost
from tests.engine.oracle_answers import OracleAnswers

GROUPED = replace(TINY, image_size=112, hidden_size=128, heads=4, kv_heads=2)
MULTI_HEAD = replace(TINY, image_size=112)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> checkpoint: the trained one, and seeded ones of 8 layers and 64 visual tokens."""
    root = tmp_path_factory.mktemp("models")
    shapes: dict[str, LlavaShape] = {
        "grouped": GROUPED,
        "multi-head": MULTI_HEAD,
        "mistral": replace(GROUPED, backbone="mistral"),
        "qwen2": replace(GROUPED, backbone="qwen2"),
    }
    seeded = {name: build_local_model(root / name, shape) for name, shape in shapes.items()}
    return {"grounding": MODEL, **seeded}


@pytest.fixture(scope="session")
def oracles(models: dict[str, Path]) -> OracleAnswers:
    return OracleAnswers(models)


@pytest.fixture(scope="session")
def v1() -> Iterator[EngineHost]:
    host = EngineHost()
    yield host
    host.close()


@pytest.fixture(scope="session")
def v2() -> Iterator[EngineHost]:
    host = EngineHost(V2_ENVIRONMENT)
    yield host
    host.close()


@pytest.fixture(params=["v1", "v2"], scope="session")
def host(request: pytest.FixtureRequest) -> EngineHost:
    """Both model runners, one after the other."""
    return request.getfixturevalue(request.param)


def engine_args(model: Path, reroute: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    """Arguments of a small eager fp32 engine, routed if `reroute` is given."""
    args: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_batched_tokens": 600,
        "kv_cache_memory_bytes": 32 * 2**20,
        "limit_mm_per_prompt": {"image": 2},
        "seed": 0,
    }
    if reroute is not None:
        args["additional_config"] = {"reroute": reroute}
    return {**args, **changes}
