"""How a turn with pictures may be cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_reroute.plan.turns import Turn

LAST_TOKENS = 2
"""Tokens that a step runs of a turn, behind its begin, at the least.

vLLM runs one new token over existing context as a decode step, in a captured CUDA graph where it has
one: a graph over all layers, in which nothing is parked or decided.
"""


def fewest_step_tokens(marker: Sequence[int]) -> int:
    """What a step must have room for: one token more than have to run together.

    marker: token ids that end a turn, all of which do where the turn brings tokens back.
    """
    return max(LAST_TOKENS, len(marker)) + 1


def prefill_chunk(turn: Turn, stops: Iterable[int], num_computed: int, num_new: int) -> int:
    """Tokens to run up to a turn's end, at most `num_new`; 0 where it waits for a step with more room.

    stops: where vLLM may have to end a chunk, see `stops_alone`.
    """
    if num_computed + num_new > turn.end:
        return num_new
    if turn.recalls and num_computed + num_new < turn.end:
        # Its few tokens do not wait in pages: all run in one step.
        return max(0, min(num_new, turn.begin - num_computed))
    if stops_alone(stops, num_computed + num_new):
        num_new -= 1
    if num_computed + num_new > turn.begin and num_new < LAST_TOKENS:
        return max(0, turn.begin - num_computed)
    return max(0, num_new)


def stops_alone(stops: Iterable[int], position: int) -> bool:
    """Whether a chunk that begins at `position` might have to stop after a single token.

    stops: starts of a turn's images behind its first, which may have to wait for room in the encoder's
    cache, and the turn's end.
    """
    return position + 1 in stops
