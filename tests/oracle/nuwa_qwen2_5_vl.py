"""What Nüwa reads from Qwen2.5-VL's vision tower, block by block.

The tower runs in raster order throughout, with windows as masks, so there is no window order to undo.
"""

from collections.abc import Mapping
from itertools import product
from math import hypot

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from .nuwa_stage1 import Seen

# Blocks whose outputs are averaged, of a tower with 32; both included.
PUBLISHED_DEPTH = 32
FEATURE_BLOCKS = (7, 23)
REACH = 0.8  # of the distance between the corners
PILLAR_QUANTILE = 0.10

# The stage-2 row: per head the mean over the last three prompt tokens, then the highest of all heads.
NUM_QUERIES = 3


def combine_rows(weights: Tensor) -> Tensor:
    """weights: [heads, up to 3, tokens], fp32; a query's weights on later tokens are zero. Returns [tokens]."""
    return weights.mean(dim=1).max(dim=0).values


def look(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Seen]:
    """One entry per image. inputs: pixel_values [patches, ...], image_grid_thw [images, 3] if there are any."""
    if "pixel_values_videos" in inputs:
        raise ValueError("Nüwa is for images; the request has a video.")
    if "pixel_values" not in inputs:
        return []
    grids = inputs["image_grid_thw"].tolist()
    parts = inputs["pixel_values"].split([t * height * width for t, height, width in grids])
    return [
        _look_at(model.model.visual, patches, height, width)
        for patches, (_, height, width) in zip(parts, grids, strict=True)
    ]


def to_embeddings(model: nn.Module, states: Tensor) -> Tensor:
    """Aggregated states are embeddings already."""
    return states.to(model.dtype)


def _look_at(tower: nn.Module, patches: Tensor, height: int, width: int) -> Seen:
    """patches: [height * width, ...], the four of a merged token together, tokens in raster order."""
    depth, side = len(tower.blocks), tower.spatial_merge_size
    if depth - 1 not in tower.fullatt_block_indexes:
        raise ValueError("Nüwa needs a last block that attends to the whole image.")
    rows, columns = height // side, width // side
    places = torch.tensor(
        [
            (row * side + down, column * side + right)
            for row, column in product(range(rows), range(columns))
            for down, right in product(range(side), repeat=2)
        ]
    )
    windows = places // (tower.window_size // tower.patch_size // side * side)
    same_window = (windows[:, None] == windows[None, :]).all(dim=-1)
    everywhere = torch.ones_like(same_window)

    hidden = tower.patch_embed(patches)
    rope = tower.rotary_pos_emb(hidden, places)
    outputs = []
    for index, block in enumerate(tower.blocks):
        visible = everywhere if index in tower.fullatt_block_indexes else same_window
        hidden, weights = run_block(block, hidden, rope, visible)
        outputs.append(hidden)
    first, last = (round(block * depth / PUBLISHED_DEPTH) for block in FEATURE_BLOCKS)
    return Seen(
        grid=(rows, columns),
        salience=attention_received(weights, side * side),
        features=tower.merger(torch.stack(outputs[first : last + 1]).mean(dim=0)),
        states=tower.merger(hidden),
        reach=REACH * hypot(*(count + count % 2 - 1 for count in (rows, columns))),
        pillar_quantile=PILLAR_QUANTILE,
        convex=True,
    )


def run_block(
    block: nn.Module, hidden: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor
) -> tuple[Tensor, Tensor]:
    """One block of the tower. hidden: [patches, vision hidden]; visible: bool [queries, keys].

    Returns its output and its attention map, fp32 [heads, patches, patches].
    """
    attention = block.attn
    projected = attention.qkv(block.norm1(hidden)).view(len(hidden), 3, attention.num_heads, -1)
    query, key, value = projected.unbind(dim=1)
    query, key = apply_rotary_pos_emb_vision(query, key, *rope)
    logits = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * query.shape[-1] ** -0.5
    weights = logits.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    mixed = torch.einsum("hqk,khd->qhd", weights, value.float()).to(hidden.dtype)
    hidden = hidden + attention.proj(mixed.flatten(start_dim=1))
    return hidden + block.mlp(block.norm2(hidden)), weights


def attention_received(weights: Tensor, patches_per_token: int) -> Tensor:
    """What a token's patches receive from all patches together: mean over heads, then over its patches.

    weights: [heads, patches, patches]. Returns [tokens], fp32.
    """
    return weights.mean(dim=0).sum(dim=0).view(-1, patches_per_token).mean(dim=-1)
