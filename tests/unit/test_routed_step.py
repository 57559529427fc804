"""The decoder on vLLM's own layers and pages: however a prompt gets there, its states are the same."""

from __future__ import annotations

import itertools

import pytest
import torch

from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.row_pieces import row_pieces
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.routing.step_decisions import StepDecisions

from .routed_model import Conversation, Conversations

REROUTE = {"layers": [1, 3, 6], "keep": [0.5, 0.1, 0.8]}
REMOVE = {"layers": [2, 5], "keep": [0.4, 0.2], "action": "remove"}
ACCUMULATED = {"layers": [1, 3, 6], "keep": [0.5, 0.1, 0.8], "scorer": "accumulated"}
NUM_PROMPT, GENERATED = 200, 6
ONE = VisualSpans((70,), (170,))
TWO = VisualSpans((40, 120), (100, 180))
FIRST = VisualSpans((0,), (90,))


@pytest.fixture(
    scope="module", params=[REROUTE, REMOVE, ACCUMULATED], ids=["reroute", "remove", "accumulated"]
)
def model(request, routed_model):
    return routed_model(request.param)


def conversation(model, spans, seed, num_prompt=NUM_PROMPT):
    routing = RequestRouting.of(spans, range(num_prompt), model.schedule, model.block_size)
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(num_prompt + GENERATED, model.hidden_size, generator=generator)
    return Conversation(routing, states)


def like(model, other, spans, seed, num_shared):
    """A conversation that begins as another one does."""
    own = conversation(model, spans, seed)
    own.states[:num_shared] = other.states[:num_shared]
    return own


def alone(model, request):
    """States of the last prompt token and of the generated ones, the prompt in one step."""
    fresh = Conversation(request.routing, request.states)
    run = Conversations(model, [fresh])
    num_prompt = len(request.states) - GENERATED
    states = [run.step({0: num_prompt})[0][-1]]
    states += [run.step({0: 1})[0][0] for _ in range(GENERATED)]
    assert all(state.any() for state in states), "rows of tokens that do not run hold zeros"
    return torch.stack(states)


def check(found, expect):
    torch.testing.assert_close(found, expect, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spans", [ONE, TWO, FIRST, None], ids=["one", "two", "first", "text"])
@pytest.mark.parametrize("chunk", [16, 50, 199])
def test_chunks(model, spans, chunk):
    request = conversation(model, spans, seed=1)
    expect = alone(model, request)
    run = Conversations(model, [request])
    found = []
    while request.computed < len(request.states):
        end = min(request.computed + chunk, NUM_PROMPT) if request.computed < NUM_PROMPT else 0
        count = end - request.computed if end else 1
        found.append(run.step({0: count})[0][-1])
    check(torch.stack(found[-GENERATED - 1 :]), expect)


def test_requests_of_all_kinds_in_the_same_steps(model):
    """Each goes its own way: whole, in chunks, resumed with generated tokens, decoding."""
    requests = [conversation(model, spans, i) for i, spans in enumerate((ONE, TWO, FIRST, None))]
    expect = [alone(model, request) for request in requests]
    run = Conversations(model, requests)
    steps = [
        {0: 90, 3: 50},
        {3: 100, 0: 109, 1: 10},
        {1: 100, 2: 203, 3: 50},  # 3 generated tokens of a request that was preempted
        {0: 1, 3: 1, 2: 1, 1: 90},
        {1: 2, 0: 1},
    ]
    seen = {i: {} for i in range(4)}
    for scheduled in steps:
        before = [request.computed for request in requests]
        for i, states in run.step(scheduled).items():
            for row, place in zip(reversed(states), itertools.count(requests[i].computed - 1, -1)):
                if place >= max(before[i], NUM_PROMPT - 1):
                    seen[i][place - NUM_PROMPT + 1] = row
    for i, states in seen.items():
        assert states, "a request that never finished shows nothing"
        for place, row in states.items():
            check(row, expect[i][place])


@pytest.mark.parametrize("hit", [32, 64, 96, 160, 192])
@pytest.mark.parametrize("together", [False, True], ids=["later", "same step"])
@pytest.mark.parametrize("spans", [ONE, TWO], ids=["one", "two"])
def test_prefixes_of_another_request(model, spans, hit, together):
    """Cached text has keys in pages only, cached image states are parked: even in the same step."""
    owner = conversation(model, spans, seed=3)
    reader = like(model, owner, spans, seed=4, num_shared=hit)
    expect, expect_owner = alone(model, reader), alone(model, owner)
    run = Conversations(model, [owner, reader])
    run.share(0, 1, hit)
    scheduled = {1: NUM_PROMPT - hit}
    if together:
        states = run.step({0: NUM_PROMPT, **scheduled})
        check(states[0][-1], expect_owner[0])
    else:
        run.step({0: NUM_PROMPT})
        states = run.step(scheduled)
    check(states[1][-1], expect[0])
    for n in range(GENERATED):
        check(run.step({1: 1})[1][0], expect[n + 1])


@pytest.mark.parametrize("most", [48, 100])
def test_rows_in_pieces_equal_rows_at_once(model, most, monkeypatch):
    """Steps of few tokens: a stage of more rows runs some after the others."""
    owner = conversation(model, ONE, seed=5)
    reader = like(model, owner, ONE, seed=6, num_shared=64)
    expect = [alone(model, owner)[0], alone(model, reader)[0]]
    monkeypatch.setattr(model.decoder.tables, "max_tokens", most)
    run = Conversations(model, [owner, reader])
    run.share(0, 1, 64)
    while owner.computed < NUM_PROMPT - 10:
        run.step({0: min(most, NUM_PROMPT - 10 - owner.computed)})
    while reader.computed < NUM_PROMPT - 10:
        run.step({1: min(most, NUM_PROMPT - 10 - reader.computed)})
    plan = run.plan([0, 1], [10, 10]).plan
    assert max(stage.num_tokens for stage in plan.stages) > most, "pieces are needed"
    states = run.step({0: 10, 1: 10})
    check(torch.stack([states[0][-1], states[1][-1]]), torch.stack(expect))


def test_pieces_begin_with_text_that_others_read(model, monkeypatch):
    """A prompt finds its image parked, and its text in blocks that a request behind it in the same
    step is about to fill: that text runs in an earlier piece."""
    earlier = conversation(model, ONE, seed=9)
    reader = like(model, earlier, ONE, seed=10, num_shared=192)
    writer = like(model, earlier, None, seed=11, num_shared=64)
    expect = alone(model, reader)
    run = Conversations(model, [earlier, reader, writer])
    run.step({0: NUM_PROMPT})
    run.share(0, 1, 192, text_owner=2)
    monkeypatch.setattr(model.decoder.tables, "max_tokens", 72)
    plan = run.plan([1, 2], [8, 64]).plan
    assert len(row_pieces(plan, 1, 72)) > 1 and len(plan.boundary.fetched) == 128
    check(run.step({1: 8, 2: 64})[1][-1], expect[0])
    check(run.step({1: 1})[1][0], expect[1])


def test_scores_of_all_decisions_add_up(model, monkeypatch):
    """Where the scorer accumulates; elsewhere each decision has its own."""
    found, choices = [], []
    for scorer in model.decoder._scorers.values():

        def watched(*args, score=scorer.score):
            found.append(score(*args))
            return found[-1]

        monkeypatch.setattr(scorer, "score", watched)
    noted = StepDecisions.add

    def noting(decisions, choice, **options):
        choices.append(choice)
        noted(decisions, choice, **options)

    monkeypatch.setattr(StepDecisions, "add", noting)
    Conversations(model, [conversation(model, ONE, seed=2)]).step({0: NUM_PROMPT})
    assert len(found) == len(choices) == len(model.schedule.layers)
    for number, choice in enumerate(choices):
        adds = model.schedule.scorer == "accumulated"
        expect = sum(found[: number + 1]) if adds else found[number]
        torch.testing.assert_close(choice.scores, expect)


def test_a_dummy_run_leaves_the_pages_alone(model):
    run = Conversations(model, [conversation(model, ONE, 7), conversation(model, None, 8)])
    run.step({0: NUM_PROMPT, 1: NUM_PROMPT})
    before = model.pool.clone()
    assert run.dummy(40).shape == (40, model.hidden_size)
    assert torch.equal(model.pool, before)
