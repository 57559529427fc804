"""How an image prompt may be cut."""

from __future__ import annotations

from vllm_reroute.plan.request_routing import RequestRouting

LAST_TOKENS = 2
"""Tokens that the step which takes a prompt's decisions runs of it, at the least.

vLLM runs one new token over existing context as a decode step, in a captured CUDA graph where it has
one: a graph over all layers, in which nothing is parked or decided.
"""


def prefill_chunk(routing: RequestRouting, num_computed: int, num_new: int) -> int:
    """Tokens to run of a prompt, at most `num_new`: no chunk behind its text prefix is a single token.

    So none leaves a single one either. 0 where the request has to wait for a step with more room.
    """
    left = routing.num_prompt - num_computed - num_new
    if left < 0:
        return num_new
    if 0 < left < LAST_TOKENS:
        num_new -= LAST_TOKENS - left
    if num_computed + num_new > routing.text_prefix and num_new < LAST_TOKENS:
        return max(0, routing.text_prefix - num_computed)
    return max(0, num_new)
