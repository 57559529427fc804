"""What a decision asks of the device, counted: the host pays for every operation it launches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.visual_spans import VisualSpans

from .operations import Operations
from .routed_model import Conversation, Conversations

REROUTE = {"layers": [1, 3, 6], "keep": [0.5, 0.1, 0.8]}
REMOVE = {"layers": [2, 5], "keep": [0.4, 0.2], "action": "remove"}
SPANS, NUM_PROMPT = VisualSpans((70,), (130,)), 150
SMALLER = VisualSpans((70,), (110,))


@pytest.fixture(scope="module", params=[REROUTE, REMOVE], ids=["reroute", "remove"])
def model(request, routed_model):
    return routed_model(request.param, dtype="bfloat16", max_num_batched_tokens=1024)


def decisions(
    model,
    num_images: int,
    cached: int = 0,
    others: VisualSpans = SPANS,
    prompt: Any = None,
    num_decodes: int = 1,
) -> list[Counter[str]]:
    """Operations of each decision of a step that ends `num_images` prompts beside `num_decodes` decodes.

    others: visual tokens of all but the first of them. prompt: token ids, where they matter.
    """
    prompt = prompt or range(NUM_PROMPT)
    routings = [
        RequestRouting.of(spans, prompt, model.schedule, model.block_size)
        for spans in (SPANS, *[others] * (num_images - 1))
    ]
    states = torch.randn(len(prompt), model.hidden_size, dtype=model.pool.dtype)
    images = [Conversation(routing, states, cached) for routing in routings]
    run = Conversations(model, [*images, *[Conversation(None, states, 60)] * num_decodes])
    counted: list[Counter[str]] = []
    decide = type(model.decoder)._decide

    def counting_decide(decoder: Any, *args: Any) -> None:
        with Operations() as counting, pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch, "from_numpy", counting.as_one("copy", torch.from_numpy))
            decide(decoder, *args)
        counted.append(counting.seen)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(model.decoder), "_decide", counting_decide)
        scheduled = [len(prompt) - cached] * num_images + [1] * num_decodes
        run.step(dict(enumerate(scheduled)))
    return [seen for seen in counted if seen]


MOST = 30
"""Operations of a decision, whatever is read back from pages."""
MOST_LATER = 26
"""Where nothing is removed, later decisions find the step's tokens as the first one has laid them out."""


@pytest.mark.parametrize("cached", [0, 64])
def test_operations_of_a_decision(model, cached):
    decisions(model, 1, cached)  # the first time a layer's layout is looked at
    one, two, four = (decisions(model, n, cached) for n in (1, 2, 4))
    uneven, more = (decisions(model, n, cached, SMALLER) for n in (2, 4))
    assert {len(seen) for seen in (one, two, four, uneven)} == {len(model.schedule.decisions)}
    assert two == four and uneven == more, "images of a step are decided about together"
    counts = [[seen.total() for seen in of] for of in (one, four, uneven)]
    assert max(map(max, counts)) <= MOST, (counts, max(uneven, key=Counter.total))
    if model.schedule.reroutes:
        assert max(max(of[1:]) for of in counts) <= MOST_LATER, counts
    print(cached, counts)


MOST_RECALLING = 44
"""Of a decision for which a later question ranks earlier pictures: which of their tokens the stage holds is
looked up, and written down, by the slots of the stage."""


def test_operations_of_a_decision_that_brings_tokens_back(routed_model):
    options = {**REROUTE, "history": "recall", "turn_marker": "ASSISTANT:"}
    model = routed_model(options, dtype="bfloat16", max_num_batched_tokens=1024)
    marker = [*model.schedule.marker]
    prompt = [1] * (NUM_PROMPT - len(marker)) + marker + [1] * 20 + marker
    decided = NUM_PROMPT + 20
    decisions(model, 1, decided, prompt=prompt)
    one, two, four = (decisions(model, n, decided, prompt=prompt) for n in (1, 2, 4))
    uneven, more = (decisions(model, n, decided, SMALLER, prompt) for n in (2, 4))
    assert {len(seen) for seen in (one, two, four, uneven)} == {len(model.schedule.decisions)}
    assert two == four and uneven == more, "prompts of a step are decided about together"
    counts = [[seen.total() for seen in of] for of in (one, four, uneven)]
    print(counts, max(uneven, key=Counter.total))
    assert max(map(max, counts)) <= MOST_RECALLING, (counts, max(uneven, key=Counter.total))


def test_a_prompt_alone_is_chosen_from_without_a_table(model):
    decisions(model, 1)
    alone, beside = (decisions(model, 1, num_decodes=n) for n in (0, 1))
    tables = [[seen["aten.gather.default"] for seen in of] for of in (alone, beside)]
    count = len(model.schedule.decisions)
    assert tables == [[0] * count, [1] * count]
