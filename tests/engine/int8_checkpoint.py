"""A checkpoint with int8 weights in the compressed-tensors format, and an oracle for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.oracle import RoutedOracle

DECODER = "language_model.model.layers"
# Int8 weights with a scale per output channel; activations quantised per token as they come.
SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["language_model.lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def make_int8_checkpoint(source: Path, int8: Path, rounded: Path) -> None:
    """From LLaVA checkpoint `source`: `int8`, and `rounded` with the same values in fp32."""
    weights = load_file(source / "model.safetensors")
    stored, plain = dict(weights), dict(weights)
    for name in [n for n in weights if n.startswith(DECODER) and n.endswith("proj.weight")]:
        scale = weights[name].abs().amax(dim=1, keepdim=True) / 127
        stored[name] = (weights[name] / scale).round().to(torch.int8)
        stored[f"{name}_scale"] = scale
        plain[name] = stored[name].float() * scale
    config = json.loads((source / "config.json").read_text())
    for folder, tensors, scheme in ((int8, stored, SCHEME), (rounded, plain, None)):
        shutil.copytree(source, folder)
        save_file(tensors, folder / "model.safetensors")
        extra = {"quantization_config": scheme} if scheme else {}
        (folder / "config.json").write_text(json.dumps(config | extra))


class Int8Oracle(RoutedOracle):
    """The oracle on rounded weights, rounding every decoder projection's input per token too."""

    def __init__(self, rounded: Path, **schedule: Any) -> None:
        super().__init__(rounded, **schedule)
        for name, module in self.model.model.language_model.layers.named_modules():
            if isinstance(module, nn.Linear):
                assert name.endswith("proj"), name
                module.register_forward_pre_hook(lambda _, inputs: (rounded_to_int8(*inputs),))


def rounded_to_int8(states: Tensor) -> Tensor:
    """states: [..., tokens, features]; the nearest of 255 levels of each token."""
    scale = states.abs().amax(dim=-1, keepdim=True) / 127
    return (states / scale).round() * scale
