"""How a turn with pictures may be cut."""

from __future__ import annotations

from vllm_reroute.plan.turns import Turn

LAST_TOKENS = 2
"""Tokens that the step which takes a turn's decisions runs of it, at the least.

vLLM runs one new token over existing context as a decode step, in a captured CUDA graph where it has
one: a graph over all layers, in which nothing is parked or decided.
"""


def prefill_chunk(turn: Turn, num_computed: int, num_new: int) -> int:
    """Tokens to run up to a turn's end, at most `num_new`: no chunk behind its begin is a single token.

    So none leaves a single one either. 0 where the request has to wait for a step with more room.
    """
    left = turn.end - num_computed - num_new
    if left < 0:
        return num_new
    if 0 < left < LAST_TOKENS:
        num_new -= LAST_TOKENS - left
    if num_computed + num_new > turn.begin and num_new < LAST_TOKENS:
        return max(0, turn.begin - num_computed)
    return max(0, num_new)
