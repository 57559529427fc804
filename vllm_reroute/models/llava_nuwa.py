"""LLaVA-1.5 whose vision encoder takes the first decision (Nüwa)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlavaConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.clip import CLIPEncoderLayer, CLIPVisionModel
from vllm.model_executor.models.llava import LlavaImageInputs
from vllm.model_executor.models.utils import get_layer_index

from vllm_reroute.models.llava import RerouteLlavaForConditionalGeneration
from vllm_reroute.models.nuwa import Nuwa, with_anchor_column
from vllm_reroute.nuwa.aggregation import LLAVA
from vllm_reroute.nuwa.depth import scaled_layer
from vllm_reroute.nuwa.grid import Grid
from vllm_reroute.nuwa.salience import class_token_row
from vllm_reroute.routing.scorers.attention import alike_on_all_ranks

_FIRST_FEATURE_LAYER, _PUBLISHED_DEPTH = 16, 24
"""Patches are alike by the mean of hidden states 16 to 24 of CLIP ViT-L's 24 layers."""


class RerouteNuwaLlavaForConditionalGeneration(Nuwa, RerouteLlavaForConditionalGeneration):
    """Routed LLaVA-1.5 with all layers of its CLIP tower.

    Salience is the class token's attention in the layer whose output LLaVA uses; collectors take in
    that layer's output, before the projector.
    """

    aggregation = LLAVA

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config: Any = vllm_config.model_config.hf_config
        with _whole_tower(config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        vision = config.vision_config
        depth, side = vision.num_hidden_layers, vision.image_size // vision.patch_size
        self.grid = Grid(side, side)
        self.selected_layer = get_layer_index(config.vision_feature_layer, depth)
        first = scaled_layer(_FIRST_FEATURE_LAYER, depth, _PUBLISHED_DEPTH)
        self.feature_layers = range(first, depth + 1)

    def _process_image_input(self, image_input: LlavaImageInputs) -> torch.Tensor:
        """[images, patches, hidden + 1], the encoder's rows."""
        assert image_input["type"] == "pixel_values", "image embeddings are refused at start"
        states, features, salience = self._run_tower(image_input["pixel_values"])
        images = zip(states, features, salience, strict=True)
        decided = [self.decide(*image, self.grid) for image in images]
        states, is_anchor = (torch.stack(parts) for parts in zip(*decided, strict=True))
        return with_anchor_column(self.multi_modal_projector(states), is_anchor)

    def _run_tower(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per patch: the selected layer's output, the feature likeness goes by, and the salience.

        pixels: [images, 3, side, side]. Returns [images, patches, dim] twice, the second in fp32,
        and [images, patches], fp32.
        """
        tower = self.vision_tower
        assert isinstance(tower, CLIPVisionModel), "others are refused at start"
        selected = self.selected_layer
        layers = [selected - 1, selected, *self.feature_layers]
        outputs = tower(pixels, select_layers=layers).chunk(len(layers), dim=-1)
        before, states, *features = outputs
        layer = tower.vision_model.encoder.layers[selected - 1]
        assert isinstance(layer, CLIPEncoderLayer)
        salience = _class_token_salience(layer, before)
        mean = torch.stack(features).mean(dim=0, dtype=torch.float32)
        return states[:, 1:], mean[:, 1:], salience


def _class_token_salience(layer: CLIPEncoderLayer, hidden: torch.Tensor) -> torch.Tensor:
    """Salience [images, patches] in a CLIP layer with input `hidden` [images, 1 + patches, dim]."""
    attention = layer.self_attn
    fused, _ = attention.qkv_proj(layer.layer_norm1(hidden))
    query, keys, _ = fused.unflatten(-1, (3, -1, attention.head_dim)).unbind(dim=2)
    return alike_on_all_ranks(class_token_row(query[:, 0], keys, attention.scale), "mean")


@contextmanager
def _whole_tower(config: LlavaConfig) -> Iterator[None]:
    """Let vLLM build all layers of the tower, not just those below the selected one."""
    selected = config.vision_feature_layer
    config.vision_feature_layer = -1
    try:
        yield
    finally:
        config.vision_feature_layer = selected
