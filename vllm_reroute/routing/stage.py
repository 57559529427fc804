"""Decoder layers between two decisions, run as one piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class DecoderStage:
    """Consecutive decoder layers, all on the same tokens."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = tuple(layers)

    def __call__(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states, residual: [tokens, hidden], the pair vLLM's decoder layers hand on."""
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states, residual
