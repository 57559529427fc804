"""The benchmark suite's own functions on a real engine: what they count is right; times are not looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench.driving import Workload, build_engine, drive, fill_pool
from benchmarks.bench.engines import EngineSpec, engine_arguments
from benchmarks.bench.routed_generate import PlainModel
from benchmarks.bench.settings import QUICK, BenchModel, Settings
from benchmarks.bench.worker import Worker
from benchmarks.local_model import TINY, build_local_model

POOL_REQUESTS = 3
ROOM = 256
SPEC = EngineSpec(name="routed", options={"schedule": "pdrop", "tier": 192})
WORK = Workload(answer_tokens=5, text=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> BenchModel:
    shape = replace(TINY, image_size=112)
    return BenchModel.of(build_local_model(tmp_path_factory.mktemp("m") / "x", shape), "float32")


@pytest.fixture(scope="module")
def worker(model: BenchModel, tmp_path_factory: Any) -> Iterator[Worker]:
    folder: Path = tmp_path_factory.mktemp("bench")
    settings = Settings(sizes=QUICK, folder=folder, dtype="float32", eager=True)
    arguments = engine_arguments(settings, model, SPEC, ROOM, 1)
    arguments["kv_cache_memory_bytes"] = POOL_REQUESTS * ROOM * model.kv_bytes * model.depth
    arguments["max_num_seqs"] = 24
    with Worker("routed", settings.logs) as worker:
        worker.call(build_engine, arguments)
        yield worker


def test_a_request_is_counted_and_answered_as_by_transformers(
    worker: Worker, model: BenchModel
) -> None:
    found = worker.call(drive, WORK)
    assert found["visual"] == model.visual == 64
    assert 0 < found["first_token_s"] < found["total_s"]
    assert found["decode_s"] < found["total_s"]
    plain = PlainModel(model.folder, "float32", SPEC.schedule(model))
    expected = plain.answer(WORK.prompt(), WORK.pictures(), WORK.answer_tokens)
    assert found["answer"] == expected["answer"]


def test_several_requests_of_one_turn(worker: Worker) -> None:
    found = worker.call(drive, replace(WORK, requests=2, answer_tokens=1))
    assert found["decode_s"] is None and len(found["answer"]) == 1
    text = worker.call(drive, replace(WORK, images=0))
    assert text["visual"] == 0 and text["prompt_tokens"] < found["prompt_tokens"]


def test_the_pool_is_filled_and_not_beyond_the_ideal(worker: Worker, model: BenchModel) -> None:
    work = replace(WORK, requests=24, answer_tokens=24)
    pool = POOL_REQUESTS * ROOM * model.kv_bytes * model.depth
    about = SPEC.about(model)
    found = worker.call(fill_pool, work, about["kept"], model.kv_bytes, pool)
    # More than the longest dense requests, fewer than there are, and none out of thin air.
    assert POOL_REQUESTS < found["in_flight"] <= found["ideal"] < 24
