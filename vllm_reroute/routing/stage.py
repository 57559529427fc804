"""Decoder layers between two decisions, run and compiled as one piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationMode, VllmConfig
from vllm.sequence import IntermediateTensors

from vllm_reroute.schedule import Stage

RunsStage = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def build_stage(layers: Sequence[nn.Module], stage: Stage, vllm_config: VllmConfig) -> RunsStage:
    """What runs `layers`, all of them on the same tokens.

    Called as `(positions, hidden_states, residual)` with [tokens] or [3, tokens] positions and
    the [tokens, hidden] pair vLLM's decoder layers hand on; residual is None where nothing has run
    since the last decision. A compiled stage takes None at the model's first layer only: vLLM
    compiles a module once and drops the guards.
    `additions`, for the first stage of a family that has them: [tokens, hidden] tensors, the n-th
    of which is added to the hidden states after the n-th layer.
    """
    if vllm_config.compilation_config.mode == CompilationMode.NONE:
        return EagerStage(layers)
    name = f"Layers{stage.first_layer}To{stage.end_layer}"

    def forward(
        self: _CompiledStage,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        additions: IntermediateTensors | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _run(self.layers, positions, hidden_states, residual, additions)

    # Compiled code is cached by class, code object and qualified name: each stage needs its own.
    forward.__qualname__ = f"{name}.forward"
    forward.__code__ = forward.__code__.replace(co_name="forward", co_qualname=f"{name}.forward")
    stage_class = type(name, (_CompiledStage,), {"forward": forward, "__module__": __name__})
    compiled_class: Callable[..., nn.Module] = support_torch_compile(
        dynamic_arg_dims={"positions": -1, "hidden_states": 0, "residual": 0, "additions": 0}
    )(stage_class)
    with set_model_tag(f"reroute_{name}"):
        return compiled_class(layers, vllm_config=vllm_config)


def _run(
    layers: Sequence[nn.Module],
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    additions: IntermediateTensors | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    added = () if additions is None else tuple(additions.tensors.values())
    for index, layer in enumerate(layers):
        hidden_states, residual = layer(positions, hidden_states, residual)
        if index < len(added):
            hidden_states = hidden_states + added[index]
    return hidden_states, residual


class EagerStage:
    """Layers one after the other. No module: those cost several times a plain call."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = tuple(layers)

    def __call__(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        additions: IntermediateTensors | None = None,
    ) -> Any:
        return _run(self.layers, positions, hidden_states, residual, additions)


class _CompiledStage(nn.Module):
    def __init__(self, layers: Sequence[nn.Module], *, vllm_config: VllmConfig) -> None:
        super().__init__()
        # A tuple: the layers stay the language model's modules, whose weights load there.
        self.layers = tuple(layers)
