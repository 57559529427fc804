"""Scheduling a decode step costs no more than stock vLLM's, whatever the number of stages."""

import sys

import pytest

from vllm_reroute.schedule import CONFIG_KEY

from .parts import VISUAL, feature, make_request
from .scheduler_steps import DEPTH, Steps

# More than two blocks of tokens, so that steps in which blocks are due are in the mean.
STEPS = 40
REQUESTS = 6


def calls_per_request_and_step(steps, request_of):
    """Python calls inside `schedule()`, mean over requests that decode."""
    steps.add(*(request_of(f"r{i}") for i in range(REQUESTS)))
    while any(r.num_output_tokens < 2 for r in steps.scheduler.requests.values()):
        steps.run()
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    schedule = steps.scheduler.schedule

    def counted(*args, **kwargs):
        sys.setprofile(count)
        try:
            return schedule(*args, **kwargs)
        finally:
            sys.setprofile(None)

    steps.scheduler.schedule = counted
    for _ in range(STEPS):
        assert len(steps.run()) == REQUESTS
    return calls / STEPS / REQUESTS


def text_request(name):
    return make_request(name, 30, max_tokens=100)


def image_request(name):
    return make_request(name, 60, [feature(5, VISUAL, name=f"{name}'s")], max_tokens=100)


@pytest.fixture(scope="module")
def stock_calls(engine_config):
    """Of each kind of request, by stock vLLM."""
    config = engine_config(max_num_batched_tokens=512, max_model_len=512)
    return {
        of: calls_per_request_and_step(Steps(config), of) for of in (text_request, image_request)
    }


@pytest.mark.parametrize("of", [text_request, image_request])
@pytest.mark.parametrize("decisions", [1, 4, DEPTH - 1])
def test_calls_do_not_grow_with_stages(engine_config, stock_calls, of, decisions):
    options = {"layers": list(range(1, decisions + 1)), "keep": [0.5] * decisions}
    config = engine_config(
        max_num_batched_tokens=512, max_model_len=512, additional_config={CONFIG_KEY: options}
    )
    calls = calls_per_request_and_step(Steps(config, units=200, parked_units=50), of)
    print(f"{of.__name__}, {decisions + 1} stages: {calls:.1f} calls, stock {stock_calls[of]:.1f}")
    assert calls <= 0.95 * stock_calls[of]
