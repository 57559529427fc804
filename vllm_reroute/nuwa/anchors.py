"""The anchors of an image: salient patches spread over all of it."""

from __future__ import annotations

import torch

from vllm_reroute.nuwa.grid import Grid

_REGION = 2
"""Side of a region, in cells."""


def select_anchors(salience: torch.Tensor, grid: Grid, num_anchors: int) -> torch.Tensor:
    """The most salient cells of the image among the most salient ones of each 2 x 2 region.

    salience: [cells], higher is better. num_anchors: at most `grid.num_cells`. A region offers its
    best ceil(4 * num_anchors / cells) cells (1, 2 and 3 for the published tiers), so there are
    always enough. Ties go to the lower cell. Returns [num_anchors] int64, ascending.
    """
    offered = _offered_by_regions(salience, grid, num_anchors)
    ranked = salience.masked_fill(~offered, -torch.inf).sort(descending=True, stable=True)
    return ranked.indices[:num_anchors].sort().values


def _offered_by_regions(salience: torch.Tensor, grid: Grid, num_anchors: int) -> torch.Tensor:
    """bool [cells]. A grid of odd sides is padded with cells that no region offers."""
    cells_per_region = _REGION * _REGION
    num_offered = -(-cells_per_region * num_anchors // grid.num_cells)
    padded = salience.new_full((grid.padded.height, grid.padded.width), -torch.inf)
    padded[: grid.height, : grid.width] = salience.view(grid.height, grid.width)
    regions = padded.unflatten(1, (-1, _REGION)).unflatten(0, (-1, _REGION)).transpose(1, 2)
    order = regions.flatten(2).sort(dim=2, descending=True, stable=True).indices
    offered = torch.zeros_like(order, dtype=torch.bool)
    offered.scatter_(2, order[..., :num_offered], True)
    in_grid = offered.unflatten(2, (_REGION, _REGION)).transpose(1, 2).reshape(padded.shape)
    return in_grid[: grid.height, : grid.width].flatten()
