"""Nüwa's first stage on one image: which tokens become anchors, and what they collect from the others.

The same for every family; what a family's tower sees is handed in as `Seen`.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from .selection import highest

REGION_SIDE = 2


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One image as the vision tower leaves it; every row is a token of the grid, in raster order."""

    grid: tuple[int, int]  # rows, columns
    salience: Tensor  # [tokens], fp32; higher becomes an anchor
    features: Tensor  # [tokens, any]; their cosines say which tokens are alike
    states: Tensor  # [tokens, any]; what anchors collect
    reach: float  # the grid distance from which on nothing is collected
    pillar_quantile: float  # anchors whose salience is not below it collect nothing
    convex: bool  # whether collected states are averaged with the anchor's own, or added to it


def num_anchors(num_tokens: int, ratio: float) -> int:
    return max(1, int(num_tokens * ratio))


def num_per_region(num_tokens: int, anchors: int) -> int:
    """How many tokens of each region may become anchors: just enough, if all regions were whole."""
    return min(REGION_SIDE**2, ceil(REGION_SIDE**2 * anchors / num_tokens))


def choose_anchors(salience: Tensor, grid: tuple[int, int], count: int) -> list[int]:
    """The most salient among the most salient of each region, in raster order.

    Regions at the end of an odd grid are smaller. Of equal saliences the lower position wins.
    """
    rows, columns = grid
    regions: dict[tuple[int, int], list[int]] = defaultdict(list)
    for token in range(rows * columns):
        row, column = divmod(token, columns)
        regions[row // REGION_SIDE, column // REGION_SIDE].append(token)
    most = num_per_region(rows * columns, count)
    candidates = sorted(
        token for region in regions.values() for token in highest(salience[region], region, most)
    )
    return highest(salience[candidates], candidates, count)


def proximity(grid: tuple[int, int], reach: float) -> Tensor:
    """One for a token itself, falling with the distance to zero at `reach`. Returns [tokens, tokens], fp32."""
    cells = torch.cartesian_prod(*(torch.arange(side) for side in grid)).double()
    distances = (cells[:, None] - cells[None, :]).norm(dim=-1)
    return (1 - (distances / reach).clamp(max=1.0)).float()


def are_pillars(salience: Tensor, quantile: float) -> Tensor:
    """salience: [anchors], fp32. Returns bool [anchors]."""
    return salience >= torch.quantile(salience, quantile)


def aggregate(seen: Seen, anchors: list[int]) -> Tensor:
    """The anchors' states, with what they collect from all tokens of the image. Returns [anchors, any], fp32."""
    states = seen.states.float()
    directions = torch.nn.functional.normalize(seen.features.float(), dim=-1)
    likeness = (directions[anchors] @ directions.T).relu()
    weights = likeness * proximity(seen.grid, seen.reach)[anchors]
    shares = weights / (weights.sum(dim=-1, keepdim=True) + 1e-8)
    if not seen.convex:
        shares[torch.arange(len(anchors)), anchors] = 1.0
    collected = shares @ states
    pillars = are_pillars(seen.salience[anchors], seen.pillar_quantile)
    return torch.where(pillars[:, None], states[anchors], collected)
