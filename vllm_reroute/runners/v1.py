"""The V1 model runner (what CPU runs): read its batch, plan the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_reroute.plan.step_plan import RequestRouting, StepPlan, plan_step
from vllm_reroute.plan.visual_spans import VisualSpans

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_input_batch import CachedRequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_reroute.schedule import RoutingSchedule

_STATE_ATTRIBUTE = "reroute_routing"


def set_step_plan(runner: GPUModelRunner, num_scheduled_tokens: dict[str, int] | None) -> None:
    """Leave the plan of the coming step with the runner's model, if that model is routed.

    num_scheduled_tokens: request id -> tokens of this step; None in dummy and profile runs, which
    are not routed.
    """
    decoder = getattr(runner.get_model(), "routed_decoder", None)
    if decoder is None:
        return
    step = decoder.routing_step
    step.plan = None
    if num_scheduled_tokens is not None:
        step.plan = plan_v1_step(runner, num_scheduled_tokens, decoder.schedule)


def plan_v1_step(
    runner: GPUModelRunner, num_scheduled_tokens: dict[str, int], schedule: RoutingSchedule
) -> StepPlan:
    """Plan from the runner's input batch, in its request order."""
    batch = runner.input_batch
    req_ids = batch.req_ids[: batch.num_reqs]
    return plan_step(
        num_computed=batch.num_computed_tokens_cpu[: batch.num_reqs].astype(np.int64),
        num_scheduled=np.array([num_scheduled_tokens[r] for r in req_ids], dtype=np.int64),
        routings=[_routing(runner.requests[r], schedule) for r in req_ids],
        ratios=schedule.ratios,
    )


def _routing(state: CachedRequestState, schedule: RoutingSchedule) -> RequestRouting | None:
    if not state.mm_features:
        return None
    # Kept on the runner's own state, so that it lives exactly as long as the request.
    if not hasattr(state, _STATE_ATTRIBUTE):
        spans = VisualSpans.of(state.mm_features)
        routing = RequestRouting.of(
            spans, state.prompt_token_ids, schedule.ratios, schedule.encoder_ratio
        )
        setattr(state, _STATE_ATTRIBUTE, routing)
    return getattr(state, _STATE_ATTRIBUTE)
