"""Room a step needs besides its own tokens."""

from __future__ import annotations


def candidate_capacity(max_num_batched_tokens: int, max_model_len: int) -> int:
    """Candidates a step may hold: its own tokens, and those of earlier steps that it decides about.

    The scheduler lets a step decide about as many as a step's tokens, or about one prompt.
    """
    return max_num_batched_tokens + max(max_num_batched_tokens, max_model_len)
