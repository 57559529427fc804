"""What Nüwa reads from LLaVA-1.5's CLIP tower, layer by layer."""

from collections.abc import Mapping
from math import isqrt, sqrt

import torch
from torch import Tensor, nn

from .nuwa_stage1 import Seen

# Of a tower with 24 layers and a 24 x 24 grid, for which the method was published.
PUBLISHED_LAYERS = 24
FIRST_FEATURE_LAYER = 16
PUBLISHED_REACH = sqrt(280)
PUBLISHED_SIDE = 24
PILLAR_QUANTILE = 0.55

# The stage-2 row: of the last prompt token alone, averaged over heads.
NUM_QUERIES = 1


def combine_rows(weights: Tensor) -> Tensor:
    """weights: [heads, 1, tokens], fp32. Returns [tokens]."""
    return weights.mean(dim=(0, 1))


def look(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Seen]:
    """One entry per image. inputs: pixel_values [images, 3, height, width] if there are any."""
    config = model.config
    if config.vision_feature_layer != -2 or config.vision_feature_select_strategy != "default":
        raise ValueError(
            "Nüwa reads the layer before the last and drops the class token; the model has vision_feature_layer="
            f"{config.vision_feature_layer}, vision_feature_select_strategy={config.vision_feature_select_strategy!r}."
        )
    if "pixel_values" not in inputs:
        return []
    pixels = inputs["pixel_values"].to(model.dtype)
    return [_look_at(model.model.vision_tower, image) for image in pixels]


def to_embeddings(model: nn.Module, states: Tensor) -> Tensor:
    """What the decoder receives for aggregated states: [tokens, vision hidden] to [tokens, hidden]."""
    return model.model.multi_modal_projector(states.to(model.dtype))


def _look_at(tower: nn.Module, image: Tensor) -> Seen:
    """image: [3, height, width]."""
    hidden = tower.pre_layrnorm(tower.embeddings(image[None]))
    hidden_states = [hidden]  # the input of the first layer, then every layer's output
    for layer in tower.encoder.layers:
        hidden_states.append(layer(hidden_states[-1], attention_mask=None))
    depth = len(tower.encoder.layers)
    side = isqrt(hidden.shape[1] - 1)
    if side * side != hidden.shape[1] - 1 or side % 2:
        raise ValueError(
            f"Nüwa needs a square grid of even side; {hidden.shape[1] - 1} patches are none."
        )
    first = round(FIRST_FEATURE_LAYER * depth / PUBLISHED_LAYERS)
    patches = [states[0, 1:].float() for states in hidden_states]
    return Seen(
        grid=(side, side),
        salience=class_token_row(tower.encoder.layers[depth - 2], hidden_states[depth - 2][0]),
        features=torch.stack(patches[first:]).mean(dim=0),
        states=patches[depth - 1],
        # Distances from corner to corner are in the proportion of the sides less one.
        reach=PUBLISHED_REACH * (side - 1) / (PUBLISHED_SIDE - 1),
        pillar_quantile=PILLAR_QUANTILE,
        convex=False,
    )


def class_token_row(layer: nn.Module, hidden: Tensor) -> Tensor:
    """The class token's attention to each patch, summed over heads.

    hidden: [1 + patches, vision hidden], the layer's input. Returns [patches], fp32.
    """
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    query = attention.q_proj(normed[0]).float().view(attention.num_heads, -1)
    keys = attention.k_proj(normed).float().view(len(hidden), attention.num_heads, -1)
    logits = torch.einsum("hd,thd->ht", query, keys) * query.shape[-1] ** -0.5
    return logits.softmax(dim=-1).sum(dim=0)[1:]
