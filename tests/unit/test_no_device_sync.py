"""Nothing of a step waits for the device: on tensors without values, reading one back is an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from vllm_reroute.plan.step_plan import RequestRouting, plan_step
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.routing.decoder import RoutedDecoder
from vllm_reroute.routing.deferred_buffer import DeferredTokenBuffer
from vllm_reroute.routing.prompt_rows import PromptRows
from vllm_reroute.routing.scorers.attention import last_prompt_row
from vllm_reroute.schedule import RerouteOptions, RoutingSchedule

HIDDEN, DEPTH = 8, 8
SCHEDULES = [
    {"layers": [2, 5], "keep": [0.5, 0.25], "action": "reroute"},
    {"layers": [2, 5], "keep": [0.5, 0.25], "scorer": "accumulated"},
    {"layers": [2, 5], "keep": [0.5, 0.25], "action": "remove"},
    {"schedule": "nuwa", "action": "remove"},
    {"schedule": "nuwa", "variant": "A"},
    {"schedule": "nuwa", "variant": "B"},
]
SPANS = VisualSpans((2,), (18,))


class FakeScorer:
    """Scores by real arithmetic on the stream, without projections."""

    def score(
        self, stream: torch.Tensor, positions: torch.Tensor, prompts: PromptRows
    ) -> torch.Tensor:
        scores = stream.new_zeros(len(prompts.lens), prompts.width)
        queries = stream[prompts.last]
        for i, keys in enumerate(stream[prompts.rows].split(prompts.lens)):
            row = last_prompt_row(queries[i].view(2, 4), keys.view(-1, 2, 4), 0.5)
            scores[i, : prompts.lens[i]] = row
        return scores


def decoder(schedule: RoutingSchedule) -> RoutedDecoder:
    """The real loop over stages, around layers that only add."""
    routed = RoutedDecoder.__new__(RoutedDecoder)
    torch.nn.Module.__init__(routed)
    routed.schedule = schedule
    routed._pieces = tuple(
        lambda positions, hidden, residual, additions=None: (
            hidden + 1,
            hidden if residual is None else residual,
        )
        for _ in schedule.pieces
    )
    routed._scorers = {
        decision.scored_at: FakeScorer()
        for decision in schedule.decisions
        if decision.scored_at is not None
    }
    routed._norm = (lambda hidden, residual: (hidden + residual, residual),)
    buffer = DeferredTokenBuffer(64, HIDDEN, torch.float32, torch.device("cpu"))
    routed.deferred = buffer if schedule.reroutes else None
    return routed


@pytest.mark.parametrize(
    "options", SCHEDULES, ids=lambda options: "-".join(map(str, options.values()))
)
def test_routed_step_reads_nothing_back(options: dict[str, Any]) -> None:
    schedule = RerouteOptions.from_mapping(options).resolve(DEPTH)
    image = RequestRouting.of(SPANS, range(20), schedule.ratios, schedule.encoder_ratio)
    plan = plan_step(np.array([0, 7]), np.array([20, 1]), [image, None], schedule.ratios)
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens, positions = torch.randn(24, HIDDEN), torch.arange(24)
        scores = torch.rand(24) if schedule.encoder_ratio else None
        output = decoder(schedule)._run_routed(tokens, positions, None, scores, plan)
    assert output.shape == (24, HIDDEN)


def test_this_test_would_notice() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.randn(3).argmax().item()
