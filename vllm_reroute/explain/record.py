"""Getting the routing trace of a request, and its answers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from vllm_reroute.explain.child import in_child
from vllm_reroute.explain.engine import answered, start_engine
from vllm_reroute.explain.question import Question
from vllm_reroute.explain.trace import RoutingTrace, TracedDecision
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.routing.token_state import Choice


def trace_request(question: Question, reroute: Mapping[str, Any]) -> tuple[RoutingTrace, str]:
    """The decisions of a routed engine on one request, and its answer.

    reroute: options by their `RerouteOptions` names. Runs an engine in a process of its own.
    """
    return in_child(_environment(), _trace_here, question, dict(reroute))


def dense_answer(question: Question) -> str:
    """What stock vLLM answers. Runs an engine in a process of its own."""
    return in_child(_environment(), _answer_here, question)


def _environment() -> dict[str, str]:
    return {
        # The engine core, and so the decoder that is recorded, in the process that asks.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Start-up notes of two engines would bury what the user asked for; setting it shows them.
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }


def _answer_here(question: Question) -> str:
    return answered(start_engine(question, None), question).outputs[0].text


def _trace_here(question: Question, reroute: dict[str, Any]) -> tuple[RoutingTrace, str]:
    llm = start_engine(question, reroute)
    recorder = _Recorder()
    llm.apply_model(recorder.observe)
    text = answered(llm, question).outputs[0].text
    return recorder.trace(), text


class _Recorder:
    """Keeps the decisions of the last prompt, of requests that run alone."""

    def __init__(self) -> None:
        self._choices: dict[int, TracedDecision] = {}
        self._routing: RequestRouting | None = None

    def observe(self, model: Any) -> None:
        """Look on at a routed model's decisions from now on."""
        self._stages = model.routed_decoder.schedule.stages
        model.routed_decoder.observer = self._see

    def trace(self) -> RoutingTrace:
        """Of the last prompt; call when it has been answered."""
        assert self._routing is not None, "a prompt with images has been answered"
        spans = self._routing.spans
        return RoutingTrace(
            num_prompt=self._routing.num_prompt,
            num_visual=spans.num_visual,
            sizes=spans.sizes,
            decisions=tuple(self._choices[stage] for stage in sorted(self._choices)),
        )

    def _see(self, choice: Choice) -> None:
        (prefill,) = choice.plan.prefills
        self._routing = prefill.routing
        mask = prefill.routing.spans.mask(prefill.first + prefill.num_tokens)[prefill.first :]
        # Candidate of the first decision -> number of the visual token.
        number = np.full(choice.plan.candidates.num_tokens, -1)
        number[prefill.start + np.flatnonzero(mask)] = np.arange(mask.sum())
        running, stage = choice.running, self._stages[choice.stage]
        kept = number[running.rows[running.visual].cpu().numpy()]
        self._choices[choice.stage] = TracedDecision(
            layer=stage.first_layer,
            end_layer=stage.end_layer,
            kept=np.sort(kept[kept >= 0]),
            scores=self._scores(choice, number, int(mask.sum())),
        )

    @staticmethod
    def _scores(choice: Choice, number: np.ndarray, num_visual: int) -> np.ndarray | None:
        """[visual tokens] fp32; NaN for those that were no candidates any more. None where all stay."""
        if choice.scores is None:
            return None
        prompts, candidates = choice.prompts, choice.candidates
        of_rows = choice.scores[0, prompts.num_cached[0] : prompts.lens[0]].float().cpu().numpy()
        ranked = candidates.visual[prompts.rows].cpu().numpy()
        rows = candidates.rows[prompts.rows].cpu().numpy()[ranked]
        of_tokens = np.full(num_visual, np.nan, dtype=np.float32)
        of_tokens[number[rows]] = of_rows[ranked]
        return of_tokens
