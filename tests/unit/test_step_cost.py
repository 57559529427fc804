"""Planning a decode step and building its metadata on the V1 runner: Python calls, whatever the number of stages."""

from __future__ import annotations

import sys

import pytest
import torch

from vllm_reroute.plan.request_routing import RequestRouting

from .routed_model import Conversation, Conversations
from .test_runners import NUM_PROMPT, SPANS, Batch

PER_STAGE = 1.5
"""Calls that one more stage may add."""


def calls_of_a_decode(model) -> int:
    """Python calls from the plan to the metadata of all layers, in a step of the size of the one before."""
    routing = RequestRouting.of(SPANS, range(NUM_PROMPT), model.schedule, model.block_size)
    states = torch.zeros(NUM_PROMPT + 1, model.hidden_size)
    requests = [Conversation(routing, states, NUM_PROMPT), Conversation(None, states, 7)]
    run = Conversations(model, requests)
    common = run.common([0, 1], [1, 1])[0]
    batch = Batch(model, run, [NUM_PROMPT, 7])
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    for _ in range(3):
        calls = 0
        sys.setprofile(count)
        try:
            with batch.planned({"image": 1, "text": 1}) as complete:
                first = model.builders[0].build(0, common)
                metadata = dict.fromkeys(model.layers_of[0], first)
                complete(metadata)
        finally:
            sys.setprofile(None)
        assert len(metadata) == model.schedule.num_layers + 1
    return calls


@pytest.fixture(scope="module")
def calls(routed_model):
    """By number of stages, all but the first of which keep the same."""
    counted = {}
    for decisions in (1, 3, 7):
        options = {"layers": list(range(1, decisions + 1)), "keep": [0.5] * decisions}
        counted[decisions + 1] = calls_of_a_decode(routed_model(options))
    return counted


def test_calls_hardly_grow_with_stages(calls):
    print(calls)
    assert calls[4] - calls[2] <= 2 * PER_STAGE
    assert calls[8] - calls[2] <= 6 * PER_STAGE
