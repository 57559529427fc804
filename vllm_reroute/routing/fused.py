"""vLLM's fused kernels, for what routing computes between its compiled pieces.

Where vLLM compiles a model, the model's modules are plain operations, for the compiler to fuse. What
runs outside compiled code nobody fuses: a norm would take seven operations, and a rotary embedding
fifteen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops, envs
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.mrope import (
    MRotaryEmbedding,
    apply_interleaved_rope,
)
from vllm.platforms import current_platform


class FusedNorm:
    """A model's RMSNorm as one kernel; other norms as they are."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm
        self._has_kernel = (
            type(norm) is RMSNorm
            and norm.variance_size_override is None
            and not envs.VLLM_BATCH_INVARIANT
            and hasattr(torch.ops._C, "rms_norm")
        )

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """states: [..., size]."""
        if not self._fits(states):
            return self.norm(states)
        # Kernels on CPU take rows to be next to each other.
        states = states.contiguous()
        normed = torch.empty_like(states)
        _custom_ops.rms_norm(normed, states, self.norm.weight, self.norm.variance_epsilon)
        return normed

    def of_sum(self, states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Of the sum of both, [n, size]; may be written into either of them."""
        if not self._fits(states):
            return self.norm(states, residual)[0]
        states, residual = states.contiguous(), residual.contiguous()
        _custom_ops.fused_add_rms_norm(
            states, residual, self.norm.weight, self.norm.variance_epsilon
        )
        return states

    def _fits(self, states: torch.Tensor) -> bool:
        """Looked at in every call: weights may be loaded anew."""
        return self._has_kernel and self.norm.weight.dtype == states.dtype


@dataclass(frozen=True)
class Angles:
    """By what tokens are rotated.

    rows: [n] int64, of `table`. table: [rows, rotary_dim], cosines and then sines; None where the
    model's own is used: `rows` are then positions, [n] or [3, n].
    """

    rows: torch.Tensor
    table: torch.Tensor | None

    def at(self, tokens: torch.Tensor | slice) -> Angles:
        """Of some of the tokens: [k] int64, or a slice."""
        return Angles(self.rows[..., tokens], self.table)


class FusedRotary:
    """A model's rotary embedding as one kernel.

    Positions in three dimensions (M-RoPE) have none that rotates and looks up at once; on CPU they
    have none at all. Their angles are looked up once for all decisions on the same tokens, and then
    stand in for those of plain positions.
    """

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self._kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]] = rotary
        self._looks_up = False
        if isinstance(rotary, CustomOp) and hasattr(torch.ops._C, "rotary_embedding"):
            self._looks_up = type(rotary) is MRotaryEmbedding and bool(rotary.mrope_section)
            if current_platform.is_cpu():
                self._kernel = rotary.forward_cpu
            elif current_platform.is_cuda():
                self._kernel = rotary.forward_cuda

    def angles(self, positions: torch.Tensor, states: torch.Tensor) -> Angles:
        """positions: [n] or [3, n]. states: of the type that is to be rotated."""
        if positions.ndim == 1 or not self._looks_up:
            return Angles(positions, None)
        rotary = self.rotary
        found = rotary._match_cos_sin_cache_dtype(states)[positions]
        # [3, n, 2, rotary_dim / 2]: which dimension counts depends on the place in the last one.
        found = found.unflatten(-1, (2, -1))
        if rotary.mrope_interleaved:
            table = apply_interleaved_rope(found, rotary.mrope_section)
        else:
            parts = found.split(rotary.mrope_section, dim=-1)
            table = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
        return Angles(torch.arange(len(table), device=table.device), table.flatten(-2))

    def __call__(
        self, angles: Angles, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both rotated, in place or not. queries, keys: [n, heads * dim], of any number of heads."""
        if angles.table is None:
            return self._kernel(angles.rows, queries, keys)
        rotary = self.rotary
        _custom_ops.rotary_embedding(
            angles.rows, queries, keys, rotary.head_size, angles.table, rotary.is_neox_style
        )
        return queries, keys
