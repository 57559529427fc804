"""What a decoder that is compiled stage by stage does while vLLM's piecewise CUDA graphs run."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.forward_context import BatchDescriptor, get_forward_context, set_forward_context

from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.routing.graphs import StageHandover

from .routed_model import CPU, Conversation, Conversations

NUM_PROMPT = 80
PADDED = 96


def hand_over(mode, hidden_size):
    """As it is where graphs of this mode are captured up to 96 tokens."""
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=mode, max_cudagraph_capture_size=PADDED),
        model_config=SimpleNamespace(dtype=torch.float32),
        device_config=SimpleNamespace(device=CPU),
    )
    return StageHandover(config, hidden_size)


@pytest.fixture(scope="module")
def model(routed_model):
    model = routed_model({"layers": [2, 5], "keep": [0.5, 0.25]})
    model.decoder._hand_over = hand_over(CUDAGraphMode.FULL_AND_PIECEWISE, model.hidden_size)
    return model


@contextmanager
def watched(model):
    """What every stage sees: the mode, the padded size, its rows, and where its inputs are."""
    seen, runs = [], model.decoder._runs

    def watching(run):
        def call(positions, hidden, residual, *more):
            context = get_forward_context()
            where = None if residual is None else (hidden.data_ptr(), residual.data_ptr())
            seen.append(
                (context.cudagraph_runtime_mode, context.batch_descriptor, len(hidden), where)
            )
            return run(positions, hidden, residual, *more)

        return call

    model.decoder._runs = tuple(map(watching, runs))
    try:
        yield seen
    finally:
        model.decoder._runs = runs


def step(model, computed, scheduled, mode):
    """States of a step padded to 96 tokens, run in this mode, and what the stages saw."""
    routing = RequestRouting.of(
        VisualSpans((40,), (60,)), range(NUM_PROMPT), model.schedule, model.block_size
    )
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(NUM_PROMPT + 1, model.hidden_size, generator=generator)
    run = Conversations(model, [Conversation(routing, states, computed=computed)])
    metadata = model.metadata(run.common([0], [scheduled]), run.plan([0], [scheduled]))
    rows = torch.zeros(PADDED, model.hidden_size)
    rows[:scheduled] = states[computed : computed + scheduled]
    descriptor = BatchDescriptor(num_tokens=PADDED)
    with (
        torch.no_grad(),
        watched(model) as seen,
        set_current_vllm_config(model.config),
        set_forward_context(
            metadata,
            model.config,
            num_tokens=PADDED,
            cudagraph_runtime_mode=mode,
            batch_descriptor=descriptor,
        ),
    ):
        return model.decoder(rows, torch.arange(PADDED) + computed)[:scheduled], seen


def test_a_routed_step_runs_without_graphs(model):
    """Its stages have other rows than the graph of the step's padded size."""
    graphs, seen = step(model, 0, NUM_PROMPT, CUDAGraphMode.PIECEWISE)
    assert {(mode, size) for mode, size, _, _ in seen} == {(CUDAGraphMode.NONE, None)}
    assert [rows for _, _, rows, _ in seen] == [80, 70, 65]
    torch.testing.assert_close(graphs, step(model, 0, NUM_PROMPT, CUDAGraphMode.NONE)[0])


def test_stages_of_other_steps_read_what_stays_where_it_is(model):
    graphs, seen = step(model, 0, 30, CUDAGraphMode.PIECEWISE)
    assert {(mode, size.num_tokens) for mode, size, _, _ in seen} == {
        (CUDAGraphMode.PIECEWISE, PADDED)
    }
    stays = tuple(part.data_ptr() for part in model.decoder._hand_over._stays)
    assert [where for *_, where in seen] == [None, stays, stays]
    eager, seen = step(model, 0, 30, CUDAGraphMode.NONE)
    assert stays not in [where for *_, where in seen], "and nothing is copied without graphs"
    torch.testing.assert_close(graphs, eager)


@pytest.mark.parametrize("mode", [*CUDAGraphMode, None])
def test_memory_for_it_only_where_such_graphs_are(mode):
    piecewise = mode in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL_AND_PIECEWISE)
    assert hand_over(mode, 8)._stays.shape == (2, PADDED if piecewise else 0, 8)
