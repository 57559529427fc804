"""What vLLM's piecewise CUDA graphs need of a decoder that is compiled stage by stage.

A graph is found by the step's padded size, which the forward context holds, and replays with the
addresses it was captured with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context, override_forward_context

from vllm_reroute.resolved import device_of, dtype_of


@contextmanager
def without_graphs() -> Iterator[None]:
    """While entered, compiled layers run without graphs: they get other rows than the step has."""
    context = get_forward_context()
    if context.cudagraph_runtime_mode == CUDAGraphMode.NONE:
        yield
        return
    eager = replace(context, cudagraph_runtime_mode=CUDAGraphMode.NONE, batch_descriptor=None)
    with override_forward_context(eager):
        yield


class StageHandover:
    """Hands the stream from one stage to the next while graphs are captured and replayed.

    vLLM gives the output of a compiled module's last graph back to the graphs' memory pool, since
    nothing it knows of reads it in another graph. Here the next stage does, whose graphs might write
    over it. So it is copied to memory that stays, [rows, hidden] each for hidden states and residual.
    """

    def __init__(self, vllm_config: VllmConfig, hidden_size: int) -> None:
        mode = vllm_config.compilation_config.cudagraph_mode
        rows = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self._graphs = graphs = mode is not None and mode.has_piecewise_cudagraphs()
        self._stays = torch.empty(
            2,
            rows if graphs else 0,
            hidden_size,
            dtype=dtype_of(vllm_config),
            device=device_of(vllm_config),
        )

    def __call__(
        self, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same values, where they stay; untouched outside piecewise graphs."""
        if (
            not self._graphs
            or get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE
        ):
            return hidden_states, residual
        hidden, rest = self._stays[:, : len(hidden_states)]
        return hidden.copy_(hidden_states), rest.copy_(residual)
