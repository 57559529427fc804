"""bf16, int8 weights and tensor parallelism."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from tests.engine.conftest import engine_args
from tests.engine.dialogues import asked, history, schedule_of
from tests.engine.host import EngineHost
from tests.engine.int8_checkpoint import Int8Oracle, make_int8_checkpoint
from tests.engine.oracle_answers import OracleAnswers
from tests.engine.probes import generate
from tests.engine.requests import MIXED
from tests.oracle import RoutedOracle
from vllm_reroute.schedule import RerouteOptions

OPTIONS: dict[str, Any] = {"layers": [2, 4, 6], "keep": [0.5, 0.25, 0.4]}
# Rounding flips near-ties. Among the least attended tokens, where these ratios cut, a flip hardly
# matters; among the most attended it changes the answer, for the oracle as for the engine.
MILD: dict[str, Any] = {"layers": [2, 5], "keep": [0.75, 0.75]}
SCHEDULE = RerouteOptions.from_mapping(OPTIONS).resolve(8)


def test_tensor_parallel_agrees_with_oracle(
    v1: EngineHost, models: Any, oracles: OracleAnswers
) -> None:
    """Two ranks, each a process, choose alike, and one of them says what. So they do where a later question
    brings visual tokens back."""
    folder = models["grouped"]
    options = {**OPTIONS, "turn_marker": "ASSISTANT:"}
    recalls = schedule_of({**OPTIONS, "history": "recall"}, folder)
    talk = asked(
        folder,
        (("What is shown?", (0,)), ("Is it red?", ()), ("Why?", ())),
        options=history({"history": "recall"}),
        explain=True,
    )[-1]
    v1.engine(**engine_args(folder, options, tensor_parallel_size=2))
    *answers, last = v1.call(generate, [*MIXED, talk])
    for ask, answer in zip(MIXED, answers, strict=True):
        oracles.check("grouped", SCHEDULE, ask, answer)
    oracles.check_tokens("grouped", recalls, talk, last)


def errors(
    host: EngineHost, model: Path, oracle: RoutedOracle, args: dict[str, Any]
) -> tuple[list[float], list[float]]:
    """Log-probability errors against the oracle along the engine's own tokens, and the share of
    each decision's kept tokens that both agree on."""
    host.engine(**args)
    processor = AutoProcessor.from_pretrained(model)
    asks = [ask for ask in MIXED if ask.images]
    distances, agreement = [], []
    for ask, answer in zip(asks, host.call(generate, asks), strict=True):
        result = oracle.run(
            ask.inputs(processor), ask.max_tokens, forced_token_ids=answer.token_ids
        )
        distances += [
            abs(logprob - result.logprobs[step, token].item())
            for step, logprobs in enumerate(answer.logprobs)
            for token, logprob in logprobs.items()
        ]
        for ours, theirs in zip(answer.selected, result.selected, strict=True):
            agreement.append(len(set(ours) & set(theirs)) / len(theirs))
    return distances, agreement


def in_oracles_words(options: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of the oracle for reroute options; None is the dense model."""
    if options is None:
        return {"action": "remove", "layers": (), "keep": ()}
    schedule = RerouteOptions.from_mapping(options).resolve(8)
    return {"action": schedule.action, "layers": schedule.layers, "keep": schedule.keep}


def test_bf16_errs_little_more_than_the_dense_model(v1: EngineHost, models: Any) -> None:
    """Rounding flips near-ties, so decisions nearly agree, and answers stay close."""
    model = models["grouped"]
    (dense, _), (routed, agreement) = (
        errors(
            v1,
            model,
            RoutedOracle(model, dtype=torch.bfloat16, **in_oracles_words(options)),
            engine_args(model, options, dtype="bfloat16"),
        )
        for options in (None, MILD)
    )
    print(
        f"bf16 mean error: dense {fmean(dense):.4f}, routed {fmean(routed):.4f}; agreement {agreement}"
    )
    assert min(agreement) >= 0.9
    assert fmean(routed) < 5 * fmean(dense)


@pytest.mark.parametrize("action", ["remove", "reroute"])
def test_int8_weights_decide_as_the_oracle(
    v1: EngineHost, models: Any, tmp_path: Path, action: str
) -> None:
    """Scoring reads keys through the quantised projection. The oracle rounds in the same places,
    but an activation between two levels may fall either way, for the dense model too."""
    int8, rounded = tmp_path / "int8", tmp_path / "rounded"
    make_int8_checkpoint(models["grouped"], int8, rounded)
    (dense, _), (routed, agreement) = (
        errors(
            v1, int8, Int8Oracle(rounded, **in_oracles_words(options)), engine_args(int8, options)
        )
        for options in (None, {**MILD, "action": action})
    )
    print(
        f"int8 mean error: dense {fmean(dense):.4f}, routed {fmean(routed):.4f}; agreement {agreement}"
    )
    assert min(agreement) >= 0.9
    assert fmean(routed) < 5 * fmean(dense)
