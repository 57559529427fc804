"""The deferred-token side buffer."""

from __future__ import annotations

import torch
from torch import nn


class DeferredTokenBuffer(nn.Module):
    """Hidden states of tokens that wait for the next decision, outside the paged KV cache.

    One row per token a step may hold, whatever the number of requests and layers: `capacity` is
    `max_num_batched_tokens`. It is allocated with the model, so vLLM's memory profile counts it.

    Rows are addresses, not places in a batch: `write` takes them explicitly. A step uses row t for
    candidate t of its decisions (its token t, where all may come back); a later user may reserve
    rows past a step's for tokens that stay parked from one step to the next (chunked image
    prompts), without changing this class.

    states: [capacity, hidden], the residual stream (hidden + residual) at a layer's input.
    """

    states: torch.Tensor

    def __init__(
        self, capacity: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        # Filled, not just reserved, so that a profile by resident memory sees it.
        states = torch.zeros(capacity, hidden_size, dtype=dtype, device=device).fill_(0)
        self.register_buffer("states", states, persistent=False)

    @property
    def num_bytes(self) -> int:
        """Device bytes held for the life of the engine."""
        return self.states.numel() * self.states.element_size()

    def open(self, num_tokens: int) -> torch.Tensor:
        """Rows [0, num_tokens) as a view [num_tokens, hidden], to be filled by the caller."""
        return self.states[:num_tokens]

    def write(self, rows: torch.Tensor, states: torch.Tensor) -> None:
        """Put states [n, hidden] at rows [n]: tokens that ran a stage rejoin the others."""
        self.states.index_copy_(0, rows, states)
