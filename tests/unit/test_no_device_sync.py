"""Nothing of a step waits for the device: on tensors without values, reading one back is an error."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from vllm_reroute.planning.step_plan import RequestRouting, plan_step
from vllm_reroute.planning.visual_spans import VisualSpans
from vllm_reroute.routing.decoder import RoutedDecoder
from vllm_reroute.routing.deferred_buffer import DeferredTokenBuffer
from vllm_reroute.routing.prompt_rows import PromptRows
from vllm_reroute.routing.scoring import last_prompt_row

HIDDEN = 8
RATIOS = (1.0, 0.5, 0.25)
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


def decoder(*, reroutes: bool) -> RoutedDecoder:
    """The real loop over stages, around layers that only add."""
    routed = RoutedDecoder.__new__(RoutedDecoder)
    torch.nn.Module.__init__(routed)
    routed.schedule = SimpleNamespace(keep=RATIOS[1:], ratios=RATIOS, reroutes=reroutes)
    routed._stages = tuple(
        lambda positions, hidden, residual, additions=None: (
            hidden + 1,
            hidden if residual is None else residual,
        )
        for _ in RATIOS
    )
    routed._scorers = (FakeScorer(), FakeScorer())
    routed._norm = (lambda hidden, residual: (hidden + residual, residual),)
    device = torch.device("cpu")
    routed.deferred = DeferredTokenBuffer(64, HIDDEN, torch.float32, device) if reroutes else None
    return routed


@pytest.mark.parametrize("reroutes", [True, False], ids=["reroute", "remove"])
def test_routed_step_reads_nothing_back(reroutes: bool) -> None:
    image = RequestRouting.of(SPANS, 20, RATIOS)
    plan = plan_step(np.array([0, 7]), np.array([20, 1]), [image, None], RATIOS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        routed = decoder(reroutes=reroutes)
        output = routed._run_routed(torch.randn(24, HIDDEN), torch.arange(24), None, plan)
    assert output.shape == (24, HIDDEN)


def test_this_test_would_notice() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.randn(3).argmax().item()
