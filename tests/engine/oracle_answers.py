"""The oracle's answers to test requests, computed once per schedule and request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.engine.family_requests import FamilyAsk, processor
from tests.engine.host import EngineHost
from tests.engine.probes import generate, generate_one_by_one
from tests.engine.requests import Answer, Ask
from tests.oracle import NuwaOracle, OracleResult, RecallOracle, RoutedOracle
from vllm_reroute.schedule import RoutingSchedule

LOGPROB_TOLERANCE = 1e-4


def oracle_of(folder: Path, schedule: RoutingSchedule) -> RoutedOracle:
    """The oracle for a checkpoint under a schedule."""
    if schedule.recalls:
        return RecallOracle(
            folder, marker=len(schedule.marker), layers=schedule.layers, keep=schedule.keep
        )
    if schedule.encoder_ratio is None:
        return RoutedOracle(
            folder,
            action=schedule.action,
            layers=schedule.layers,
            keep=schedule.keep,
            accumulates=schedule.scorer == "accumulated",
        )
    return NuwaOracle(
        folder,
        action=schedule.action,
        variant=schedule.variant,
        stage1_ratio=schedule.encoder_ratio,
        layers=schedule.layers[1:],
        keep=schedule.keep[1:],
    )


def turn_ends(prompt: list[int], schedule: RoutingSchedule) -> list[int]:
    """One past every marker of a prompt."""
    marker = list(schedule.marker)
    places = range(len(marker), len(prompt) + 1)
    return [end for end in places if prompt[end - len(marker) : end] == marker]


class OracleAnswers:
    """Oracles by model and schedule."""

    def __init__(self, models: dict[str, Path]) -> None:
        self._models = models
        self._oracles: dict[Any, RoutedOracle] = {}
        self._results: dict[Any, OracleResult] = {}

    def result(
        self, model: str, schedule: RoutingSchedule, ask: Ask | FamilyAsk, prompt: list[int]
    ) -> OracleResult:
        """prompt: the token ids the engine saw, placeholders expanded."""
        decides = (schedule.action, schedule.variant, schedule.scorer, schedule.history)
        key = (model, *decides, schedule.layers, schedule.keep)
        if key not in self._oracles:
            self._oracles[key] = oracle_of(self._models[model], schedule)
        request = (key, ask.key)
        if request not in self._results:
            inputs = ask.inputs(processor(self._models[model]))
            assert inputs["input_ids"][0].tolist() == prompt
            ends = {"turn_ends": turn_ends(prompt, schedule)} if schedule.keeps_turns else {}
            self._results[request] = self._oracles[key].run(inputs, ask.max_tokens, **ends)
        return self._results[request]

    def check(
        self,
        model: str,
        schedule: RoutingSchedule,
        ask: Ask | FamilyAsk,
        answer: Answer,
        tolerance: float = LOGPROB_TOLERANCE,
    ) -> OracleResult:
        """Tokens, log-probabilities, decisions and the oracle's own K/V lengths."""
        result = self.check_tokens(model, schedule, ask, answer, tolerance)
        self._check_oracle_lengths(schedule, ask, answer, result)
        return result

    def check_tokens(
        self,
        model: str,
        schedule: RoutingSchedule,
        ask: Ask | FamilyAsk,
        answer: Answer,
        tolerance: float = LOGPROB_TOLERANCE,
    ) -> OracleResult:
        """Tokens, log-probabilities, and decisions where it asked for them."""
        result = self.result(model, schedule, ask, answer.prompt_token_ids)
        assert answer.token_ids == result.token_ids
        if ask.visual and ask.explain:
            assert answer.selected == result.selected
        for step, logprobs in enumerate(answer.logprobs):
            for token, logprob in logprobs.items():
                expected = result.logprobs[step, token].item()
                assert abs(logprob - expected) < tolerance, (step, token, logprob, expected)
        return result

    def check_together_and_cached(
        self, host: EngineHost, model: str, schedule: RoutingSchedule, asks: Sequence[Any]
    ) -> None:
        """All at once; then one by one, each finding its own prompt of before in the cache."""
        for ask, answer in zip(asks, host.call(generate, asks), strict=True):
            self.check(model, schedule, ask, answer)
        for ask, answer in zip(asks, host.call(generate_one_by_one, asks), strict=True):
            self.check(model, schedule, ask, answer)
            assert answer.num_cached >= 32 or len(answer.prompt_token_ids) <= 64

    def _check_oracle_lengths(
        self, schedule: RoutingSchedule, ask: Ask | FamilyAsk, answer: Answer, result: OracleResult
    ) -> None:
        """The oracle routed at all: text + k entries in every layer."""
        visual = len(torch.as_tensor(result.scores[0])) if ask.visual else 0
        text = len(answer.prompt_token_ids) - visual + len(answer.token_ids) - 1
        kept = schedule.kept_per_stage(visual)
        if schedule.encoder_ratio is not None and ask.visual:
            kept = [len(selected) for selected in result.selected]
        expected = [
            text + k
            for stage, k in zip(schedule.stages, kept, strict=True)
            for _ in range(stage.num_layers)
        ]
        assert result.kv_lens == expected
