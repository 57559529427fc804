"""Routed engines answer exactly as the plain-transformers oracle, on both model runners."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks.grounding.questions import ANSWER_TOKENS
from tests.engine.conftest import engine_args
from tests.engine.host import EngineHost
from tests.engine.oracle_answers import LOGPROB_TOLERANCE, OracleAnswers
from tests.engine.probes import generate, generate_one_by_one, runner_name
from tests.engine.requests import MIXED, SCENES, Ask, SceneAsk, scene_questions
from tests.engine.runners import on_runners
from vllm_reroute.schedule import RerouteOptions

# Of the seeded models, and of the trained one, for whose depth the schedules were published.
DEPTH, TRAINED_DEPTH = 8, 32
# A trained model is sure of itself: its logits are several times as large, and rounding with them.
TRAINED_TOLERANCE = 1e-3

PUBLISHED = [
    {"schedule": schedule, "action": action, "tier": tier}
    for schedule in ("fastv", "pdrop")
    for action in ("remove", "reroute")
    for tier in (192, 128, 64)
]
CUSTOM = [
    # The ratio falls and rises again.
    {"layers": [1, 3, 6], "keep": [0.5, 0.1, 0.8]},
    {"layers": [1, 3, 6], "keep": [0.5, 0.1, 0.8], "action": "remove"},
    # Equal ratios share a KV cache group, also with the dense stage.
    {"layers": [2, 4, 6], "keep": [0.3, 1.0, 0.3]},
    # One layer, then five.
    {"layers": [1, 2, 7], "keep": [0.7, 0.25, 0.02]},
    {"schedule": "pdrop", "budget": 200},
    # Accumulates what is scored where all are kept, too.
    {"layers": [1, 3, 6], "keep": [0.4, 1.0, 0.2], "scorer": "accumulated"},
]

CASES = [
    *(("grounding", TRAINED_DEPTH, options, SCENES) for options in PUBLISHED),
    ("grounding", TRAINED_DEPTH, {"schedule": "fastv", "scorer": "accumulated"}, SCENES),
    *(("grouped", DEPTH, options, MIXED) for options in CUSTOM),
]


def label(options: dict[str, Any]) -> str:
    return "-".join(str(v).replace(" ", "") for v in options.values())


@on_runners(
    "model, depth, options, asks",
    {f"{case[0]}-{label(case[2])}": case for case in CASES},
    v2=[
        "grounding-fastv-remove-64",
        "grounding-pdrop-reroute-128",
        "grouped-[1,3,6]-[0.5,0.1,0.8]",
        "grouped-[1,3,6]-[0.5,0.1,0.8]-remove",
        "grouped-[1,3,6]-[0.4,1.0,0.2]-accumulated",
    ],
)
def test_schedule_agrees_with_oracle(
    host: EngineHost,
    models: Any,
    oracles: OracleAnswers,
    model: str,
    depth: int,
    options: dict[str, Any],
    asks: tuple[Ask, ...],
) -> None:
    schedule = RerouteOptions.from_mapping(options).resolve(depth)
    host.engine(**engine_args(models[model], options))
    for ask, answer in zip(asks, host.call(generate, asks), strict=True):
        tolerance = TRAINED_TOLERANCE if model == "grounding" else LOGPROB_TOLERANCE
        oracles.check(model, schedule, ask, answer, tolerance)


def test_the_trained_model_answers_its_questions(v1: EngineHost, models: Any) -> None:
    """So that agreement is about answers that mean something."""
    v1.engine(**engine_args(models["grounding"], None))
    asks = [
        replace(SceneAsk.about(number), max_tokens=ANSWER_TOKENS)
        for number in range(len(scene_questions()))
    ]
    tokenizer = AutoTokenizer.from_pretrained(models["grounding"])
    said = [tokenizer.decode(answer.token_ids) for answer in v1.call(generate, asks)]
    right = [
        text.strip().startswith(question.answer + "</s>")
        for text, question in zip(said, scene_questions(), strict=True)
    ]
    assert sum(right) >= len(right) - 2


@pytest.mark.parametrize("decoder", ["multi-head", "mistral", "qwen2"])
def test_other_decoders_agree_with_oracle(
    v1: EngineHost, models: Any, oracles: OracleAnswers, decoder: str
) -> None:
    """Every head its own keys; Mistral; Qwen2 with its biases."""
    options = {"schedule": "pdrop", "tier": 128}
    schedule = RerouteOptions.from_mapping(options).resolve(DEPTH)
    v1.engine(**engine_args(models[decoder], options))
    for ask, answer in zip(MIXED, v1.call(generate, MIXED), strict=True):
        oracles.check(decoder, schedule, ask, answer)


def test_batch_does_not_change_an_answer(v1: EngineHost, models: Any) -> None:
    v1.engine(**engine_args(models["grouped"], {"schedule": "pdrop", "tier": 64}))
    together, alone = v1.call(generate, MIXED), v1.call(generate_one_by_one, MIXED)
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.selected == other.selected


def test_each_host_runs_its_model_runner(v1: EngineHost, v2: EngineHost, models: Any) -> None:
    for runner, name in ((v1, "V1"), (v2, "V2")):
        runner.engine(**engine_args(models["grouped"], {"schedule": "pdrop", "tier": 64}))
        assert runner.call(runner_name) == name
