"""How much attention the patches of an image receive in one layer of its vision encoder.

Only the rows that are needed are computed, never a map of all patches to all patches.
"""

from __future__ import annotations

import torch

_MAX_LOGITS = 2**24
"""Attention logits held at a time: 64 MiB."""


def class_token_row(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of the class token to every patch, summed over heads (LLaVA).

    query: [images, heads, dim], of the class token; keys: [images, 1 + patches, heads, dim], the
    class token's first. The softmax includes the class token. Returns [images, patches], fp32.
    """
    logits = torch.einsum("ihd,ithd->iht", query.float(), keys.float()) * scale
    return logits.softmax(dim=-1)[..., 1:].sum(dim=1)


def attention_received(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention every patch gets from all patches of its image, summed over heads (Qwen2.5-VL).

    queries, keys: [patches, heads, dim], rotated. Returns [patches], fp32: the column sums of the
    attention map, which is computed a block of rows at a time.
    """
    num_patches, num_heads, _ = keys.shape
    transposed = keys.permute(1, 2, 0).float()
    received = keys.new_zeros(num_patches, dtype=torch.float32)
    block_size = max(1, _MAX_LOGITS // (num_heads * num_patches))
    for block in queries.split(block_size):
        logits = torch.bmm(block.transpose(0, 1).float(), transposed) * scale
        received += logits.softmax(dim=-1).sum(dim=(0, 1))
    return received
