"""The one rule by which the layers of a K/V group share a block table.

A block holds `block_size` tokens of ONE layer. Entry i * num_layers + j of the group's table is
block i of its layer j. So groups of any size share one pool without padding layers, with one table
a group, and the blocks of the same tokens are next to each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

LayerBlocks = tuple[Any, ...]
"""The blocks that hold the same tokens, one per layer of a group."""


def flat(blocks: Iterable[LayerBlocks]) -> list[Any]:
    """Table entries of blocks given token by token."""
    return [block for layers in blocks for block in layers]


def by_tokens(groups: Sequence[tuple[list[Any], int]]) -> list[Any]:
    """Table entries of several groups, each with its number of layers: those of the same tokens next to
    each other. Entries without a block, null blocks, are left out."""
    blocks: list[Any] = []
    for index in range(max(-(-len(entries) // num_layers) for entries, num_layers in groups)):
        for entries, num_layers in groups:
            own = entries[index * num_layers : (index + 1) * num_layers]
            if own and not own[0].is_null:
                blocks += own
    return blocks


def dealt(tables: np.ndarray, num_layers: int, num_blocks: int) -> np.ndarray:
    """[num_layers, requests, num_blocks], each layer's first blocks, of tables [requests, entries]."""
    used = tables[:, : num_layers * num_blocks]
    return used.reshape(len(tables), num_blocks, num_layers).transpose(2, 0, 1)
