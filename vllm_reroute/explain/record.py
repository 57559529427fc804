"""Getting the routing trace of a request, and its answers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from vllm_reroute.explain.child import in_child
from vllm_reroute.explain.engine import answered, start_engine
from vllm_reroute.explain.question import Question
from vllm_reroute.explain.trace import RoutingTrace, trace_of
from vllm_reroute.schedule import RoutingSchedule
from vllm_reroute.schedule.request_options import KEY, SCORES


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
        # An engine core of its own would outlive a child that is killed.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Start-up notes of two engines would bury what the user asked for; setting it shows them.
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }


def _answer_here(question: Question) -> str:
    return answered(start_engine(question, None), question).outputs[0].text


def _trace_here(question: Question, reroute: dict[str, Any]) -> tuple[RoutingTrace, str]:
    llm = start_engine(question, reroute)
    output = answered(llm, question, {KEY: {"explain": SCORES}})
    (completion,) = output.outputs
    assert completion.routed_experts is not None, "asked for"
    assert output.prompt_token_ids is not None, "vLLM gives the prompt back"
    schedule = RoutingSchedule.of(llm.llm_engine.vllm_config)
    trace = trace_of(completion.routed_experts, schedule, len(output.prompt_token_ids))
    return trace, completion.text
