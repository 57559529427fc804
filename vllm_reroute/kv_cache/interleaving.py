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


def by_tokens(entries: Sequence[Any], num_layers: int) -> list[LayerBlocks]:
    """The inverse of `flat`."""
    return [tuple(entries[i : i + num_layers]) for i in range(0, len(entries), num_layers)]


def dealt(tables: np.ndarray, num_layers: int, num_blocks: int) -> np.ndarray:
    """[num_layers, requests, num_blocks], each layer's first blocks, of tables [requests, entries]."""
    used = tables[:, : num_layers * num_blocks]
    return used.reshape(len(tables), num_blocks, num_layers).transpose(2, 0, 1)
