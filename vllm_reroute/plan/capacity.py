"""Room a step needs besides its own tokens."""

from __future__ import annotations


def candidate_capacity(max_num_batched_tokens: int, max_model_len: int) -> int:
    """Candidates a step may hold: its own tokens, and those of earlier steps that it decides about.

    The scheduler lets a step decide about as many as a step's tokens, or about one prompt.
    """
    return max_num_batched_tokens + max(max_num_batched_tokens, max_model_len)


RUNNER_COPIES = 2
"""Block tables that vLLM's runner holds itself: one by request, one in the order of the batch."""

_TABLE_BYTES = 2 * 2**30
_LARGEST_BLOCK = 128


def table_bytes(layers: int, max_num_seqs: int, max_model_len: int, block_size: int) -> int:
    """Bytes of one set of block tables: an int32 per layer, request and block of the longest one."""
    return 4 * layers * max_num_seqs * -(-max_model_len // block_size)


def bounded_block_size(smallest: int, layers: int, max_num_seqs: int, max_model_len: int) -> int:
    """The smallest block size, doubled until the runner's tables take at most 2 GiB, or 128 is reached.

    Stock tables have one row of blocks a request; here every layer has one. Small blocks waste less
    of a stage that keeps few tokens, so size grows only where very many long requests are allowed.
    """
    size = smallest
    while (
        size < _LARGEST_BLOCK
        and RUNNER_COPIES * table_bytes(layers, max_num_seqs, max_model_len, size) > _TABLE_BYTES
    ):
        size *= 2
    return size
