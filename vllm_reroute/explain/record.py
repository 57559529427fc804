"""Getting the routing trace of a request, and its answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from vllm_reroute.explain.child import in_child
from vllm_reroute.explain.engine import answered, start_engine
from vllm_reroute.explain.question import Question
from vllm_reroute.explain.trace import RoutingTrace, TracedDecision


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
    with _recorded() as traces:
        text = answered(llm, question).outputs[0].text
    return traces[-1], text


@contextmanager
def _recorded() -> Iterator[list[RoutingTrace]]:
    """Traces of the prefills of single requests that run meanwhile; the last one is complete."""
    from vllm_reroute.routing.decoder import RoutedDecoder

    traces: list[RoutingTrace] = []
    decided: list[TracedDecision] = []
    run_routed, choose = RoutedDecoder._run_routed, RoutedDecoder._choose

    def recording_run(self: Any, *inputs: Any) -> Any:
        decided.clear()
        output = run_routed(self, *inputs)
        (prefill,) = inputs[-1].prefills
        spans = prefill.routing.spans
        traces.append(
            RoutingTrace(
                num_prompt=prefill.routing.num_prompt,
                num_visual=spans.num_visual,
                sizes=spans.sizes,
                decisions=tuple(decided),
            )
        )
        return output

    def recording_choose(
        self: Any, decision: Any, scores: Any, candidates: Any, prompts: Any, plan: Any
    ) -> Any:
        running, chosen = choose(self, decision, scores, candidates, prompts, plan)
        (prefill,) = plan.prefills
        visual = prefill.routing.spans.mask(prefill.num_tokens)
        # Row of the step -> number of the visual token.
        number = np.full(plan.num_tokens, -1)
        number[prefill.start + np.flatnonzero(visual)] = np.arange(visual.sum())
        stage = next(s for s in self.schedule.stages if s.first_layer == decision.layer)
        kept = number[running.rows[running.visual].cpu().numpy()]
        of_tokens = None
        # Where all run, nothing was ranked, and scores would be those of an earlier decision.
        if chosen is not None:
            of_tokens = np.full(visual.sum(), np.nan, dtype=np.float32)
            ranked = candidates.visual[prompts.rows].cpu().numpy()
            rows = candidates.rows[prompts.rows].cpu().numpy()[ranked]
            of_prompt = scores[0, : prompts.lens[0]].float().cpu().numpy()
            of_tokens[number[rows]] = of_prompt[ranked]
        decided.append(
            TracedDecision(
                layer=decision.layer,
                end_layer=stage.end_layer,
                kept=np.sort(kept[kept >= 0]),
                scores=of_tokens,
            )
        )
        return running, chosen

    RoutedDecoder._run_routed, RoutedDecoder._choose = recording_run, recording_choose
    try:
        yield traces
    finally:
        RoutedDecoder._run_routed, RoutedDecoder._choose = run_routed, choose
