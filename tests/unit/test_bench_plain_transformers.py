"""The suite's plain-transformers side does what the oracle does: it must be a fair opponent, not a wrong one."""

import pytest
from transformers import DynamicCache

from benchmarks.bench.driving import Workload
from benchmarks.bench.routed_generate import PlainModel
from benchmarks.local_model import SHAPES, build_local_model
from tests.oracle import RoutedOracle
from vllm_reroute.schedule import RerouteOptions

WORK = Workload(images=1, answer_tokens=6, text=2)
OPTIONS = [
    None,
    {"schedule": "pdrop", "tier": 192},
    {"schedule": "pdrop", "action": "remove", "tier": 64},
    {"layers": [2, 5], "keep": [0.2, 0.6]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "grouped"
    return build_local_model(path, SHAPES["tiny-grouped"])


@pytest.mark.parametrize("options", OPTIONS)
def test_same_tokens_and_lengths_as_the_oracle(folder, options, monkeypatch):
    schedule = RerouteOptions.from_mapping(options).resolve(8) if options else None
    model = PlainModel(folder, "float32", schedule)
    caches = []
    monkeypatch.setattr(
        "benchmarks.bench.routed_generate.DynamicCache",
        lambda: caches.append(DynamicCache()) or caches[-1],
    )
    found = model.answer(WORK.prompt(), WORK.pictures(), WORK.answer_tokens)
    oracle = RoutedOracle(
        folder,
        action=schedule.action if schedule else "remove",
        layers=schedule.layers if schedule else (),
        keep=schedule.keep if schedule else (),
    )
    inputs = model.processor(text=WORK.prompt(), images=WORK.pictures(), return_tensors="pt")
    expected = oracle.run(inputs, WORK.answer_tokens)
    assert found["answer"] == expected.token_ids
    assert 0 < found["first_token_s"] < found["total_s"]
    if schedule:
        lengths = [caches[0].get_seq_length(layer) for layer in range(8)]
        assert lengths == expected.kv_lens
