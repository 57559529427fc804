"""How an image prompt may be cut."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_reroute.plan.request_routing import RequestRouting

LAST_TOKENS = 2
"""Tokens that a step runs of an image prompt behind its text prefix, at the least.

vLLM runs one new token over existing context as a decode step, in a captured CUDA graph where it has
one: a graph over all layers, in which nothing is parked or decided.
"""

FEWEST_STEP_TOKENS = LAST_TOKENS + 1
"""What a step must have room for, so that three tokens need not be cut into two and one."""


def prefill_chunk(
    routing: RequestRouting, stops: Iterable[int], num_computed: int, num_new: int
) -> int:
    """Tokens to run of a prompt, at most `num_new`; 0 where it has to wait for a step with more room.

    stops: where vLLM may have to end a chunk, see `stops_alone`.
    """
    if num_computed + num_new > routing.num_prompt:
        return num_new
    if stops_alone(stops, num_computed + num_new):
        num_new -= 1
    if num_computed + num_new > routing.text_prefix and num_new < LAST_TOKENS:
        return max(0, routing.text_prefix - num_computed)
    return max(0, num_new)


def stops_alone(stops: Iterable[int], position: int) -> bool:
    """Whether a chunk that begins at `position` might have to stop after a single token.

    stops: starts of images behind the first, which may have to wait for room in the encoder's cache,
    and the prompt's end.
    """
    return position + 1 in stops
