"""The deferred-token side buffer."""

from __future__ import annotations

import torch
from torch import nn


class DeferredTokenBuffer(nn.Module):
    """Hidden states of tokens that wait for the next decision of their step, outside the K/V pages.

    Tokens that wait for a *later step* are parked in pages (`attention/parked.py`). Once all of a
    prompt is there, its tokens are copied here: pages are shared between requests and never
    changed, and these states change with every stage they run. A step uses row t for candidate t.

    states: [capacity, hidden], the residual stream (hidden + residual) at a layer's input.
    Allocated with the model, so vLLM's memory profile counts it.
    """

    states: torch.Tensor

    def __init__(
        self, capacity: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        # Filled, not just reserved, so that a profile by resident memory sees it.
        states = torch.zeros(capacity, hidden_size, dtype=dtype, device=device).fill_(0)
        self.register_buffer("states", states, persistent=False)

    def open(self, num_tokens: int) -> torch.Tensor:
        """Rows [0, num_tokens) as a view [num_tokens, hidden], to be filled by the caller."""
        return self.states[:num_tokens]
