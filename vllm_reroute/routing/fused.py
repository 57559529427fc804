"""vLLM's fused kernels, for what routing computes between its compiled pieces.

Where vLLM compiles a model, the model's modules are plain operations, for the compiler to fuse. What
runs outside compiled code nobody fuses: a norm would take seven operations, and a rotary embedding
fifteen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm import _custom_ops, envs
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.platforms import current_platform

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]


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


def fused_rotary(rotary: Any) -> Rotary:
    """A rotary embedding as the platform's own kernel, also where the model's is plain operations."""
    if isinstance(rotary, CustomOp) and current_platform.is_cpu():
        return rotary.forward_cpu
    if isinstance(rotary, CustomOp) and current_platform.is_cuda():
        return rotary.forward_cuda
    return rotary
