"""Getting the routing trace of a request, and its answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_reroute.explain.child import in_child
from vllm_reroute.explain.engine import answered, start_engine
from vllm_reroute.explain.question import Question
from vllm_reroute.explain.trace import RoutingTrace, TracedDecision
from vllm_reroute.schedule import RoutingSchedule

if TYPE_CHECKING:
    import torch

    from vllm_reroute.routing.token_state import TokenState


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
    schedule = RoutingSchedule.of(llm.llm_engine.vllm_config)
    with _recorded(schedule) as traces:
        text = answered(llm, question).outputs[0].text
    return traces[-1], text


@contextmanager
def _recorded(schedule: RoutingSchedule) -> Iterator[list[RoutingTrace]]:
    """Traces of single requests, one for each time that a request's decisions are taken meanwhile."""
    from vllm_reroute.routing.token_state import TokenState

    traces: list[RoutingTrace] = []
    choose = TokenState.choose

    def recording_choose(self: TokenState, stage: int, *, removes: bool) -> None:
        (prefill,) = self.plan.prefills
        spans, layers = prefill.routing.spans, schedule.stages[stage]
        # Place among the candidates -> number of the visual token, -1 for text.
        visual = spans.mask(prefill.first + prefill.num_tokens)[prefill.first :]
        number = np.full(self.plan.candidates.num_tokens, -1)
        number[prefill.start + np.flatnonzero(visual)] = np.arange(spans.num_visual)
        # Where all run, nothing was ranked, and scores would be those of an earlier decision.
        scores = None
        if not self.keeps_all(stage):
            scores = np.full(spans.num_visual, np.nan, dtype=np.float32)
            ranked = number[_on_host(self.candidates.rows[self.prompts.rows])]
            of_prompt = _on_host(self.scores.flatten()[self.prompts.slots].float())
            scores[ranked[ranked >= 0]] = of_prompt[ranked >= 0]
        choose(self, stage, removes=removes)
        running = number[_on_host(self.running.rows)]
        decision = TracedDecision(
            layer=layers.first_layer,
            end_layer=layers.end_layer,
            kept=np.sort(running[running >= 0]),
            scores=scores,
        )
        earlier = () if decision.layer == schedule.boundary else traces.pop().decisions
        traces.append(
            RoutingTrace(
                num_prompt=prefill.routing.num_prompt,
                num_visual=spans.num_visual,
                sizes=spans.sizes,
                decisions=(*earlier, decision),
            )
        )

    TokenState.choose = recording_choose
    try:
        yield traces
    finally:
        TokenState.choose = choose


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
