"""The random baseline: the same choice whenever a request comes back, another one for another."""

import pytest
import torch

from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.routing.prompt_rows import PromptRows
from vllm_reroute.routing.scorers import ScoringLayer
from vllm_reroute.routing.scorers.attention import LAST_TOKEN
from vllm_reroute.routing.scorers.random import RandomScorer
from vllm_reroute.schedule import RerouteOptions

from .steps import Going, plan_of, routing_of

RATIO = 0.25
SCHEDULE = RerouteOptions(layers=(4,), keep=(RATIO,), scorer="random").resolve(8)
SPANS = VisualSpans((3,), (103,))
PROMPTS = [list(range(110)), [7] * 130, list(range(1, 111))]


def scores(prompts, layer=4, generated=0, computed=0):
    """Scores of a step in which the prompts end, `generated` tokens behind each of them."""
    batch = [
        Going(routing_of(SPANS, prompt, SCHEDULE), computed, len(prompt) + generated - computed)
        for prompt in prompts
    ]
    plan = plan_of(batch, SCHEDULE)
    rows = PromptRows.of(plan, None, torch.device("cpu"))
    stream = torch.zeros(rows.num_rows, 8)
    at = ScoringLayer(number=layer, layer=torch.nn.Identity(), rule=LAST_TOKEN, most_rows=64)
    table = RandomScorer(at).score(stream, torch.arange(rows.num_rows), rows)
    assert table.dtype == torch.float32 and table.shape == (len(prompts), rows.width)
    return [row[: len(prompt)] for row, prompt in zip(table, prompts, strict=True)]


@pytest.mark.parametrize(
    "generated,computed", [(0, 0), (17, 0), (0, 60)], ids=["first", "resumed", "in chunks"]
)
def test_a_request_has_its_own_scores_in_any_batch(generated, computed):
    together = scores(PROMPTS, generated=generated, computed=computed)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert torch.equal(row, scores([prompt])[0])


def test_requests_and_layers_differ():
    first, _, other = scores(PROMPTS)
    assert not torch.equal(first, other)
    assert not torch.equal(first, scores(PROMPTS, layer=5)[0])


def test_every_token_has_the_same_chance():
    """Over many requests the share that keeps a place is near the ratio."""
    prompts = [[n] * 110 for n in range(2000)]
    top = torch.stack([row[3:103] for row in scores(prompts)]).topk(25, dim=1).indices
    shares = torch.bincount(top.flatten(), minlength=100) / len(prompts)
    # Five standard deviations of a share.
    assert (shares - RATIO).abs().max() < 5 * (RATIO * (1 - RATIO) / len(prompts)) ** 0.5


def test_options():
    schedule = RerouteOptions(schedule="fastv", scorer="random").resolve(32)
    assert schedule.scorer == "random"
    assert type(schedule).from_dict(schedule.to_dict()) == schedule
    assert RerouteOptions(schedule="fastv").resolve(32).scorer == "attention"
    assert RerouteOptions(layers=(2,), keep=(0.5,), scorer="random").resolve(8).scorer == "random"
    with pytest.raises(ValueError, match="--reroute-scorer 'best' is unknown"):
        RerouteOptions(schedule="fastv", scorer="best")
    with pytest.raises(ValueError, match="--reroute-scorer random needs a schedule"):
        RerouteOptions(scorer="random")
    with pytest.raises(ValueError, match="--reroute-scorer random cannot be combined with"):
        RerouteOptions(schedule="nuwa", scorer="random")
