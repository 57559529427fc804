"""An image's visual tokens as cells of a grid, in raster order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Grid:
    """height, width: cells; cell y * width + x is visual token number y * width + x."""

    height: int
    width: int

    @property
    def num_cells(self) -> int:
        return self.height * self.width

    @property
    def padded(self) -> Grid:
        """The smallest grid of even sides around it, so that 2 x 2 regions cover it."""
        return Grid(self.height + self.height % 2, self.width + self.width % 2)

    @property
    def diagonal(self) -> float:
        """Distance of the two cells furthest apart."""
        return math.hypot(self.height - 1, self.width - 1)


def proximity(cells: torch.Tensor, grid: Grid, reach: float) -> torch.Tensor:
    """How near each of some cells is to every cell: 1 at the same cell, falling to 0 at `reach`.

    cells: [n] int64. reach: a Euclidean distance in cells, above 0. Returns [n, cells], fp32.
    """
    every = torch.arange(grid.num_cells, device=cells.device)
    down = (cells // grid.width).unsqueeze(1) - every // grid.width
    across = (cells % grid.width).unsqueeze(1) - every % grid.width
    distance = (down * down + across * across).float().sqrt()
    return 1.0 - (distance / reach).clamp(max=1.0)
