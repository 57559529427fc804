"""The rectangles that visual tokens cover."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One complete look the model takes at a picture.

    name: what tells it from other looks at the same picture, may be empty. first_frame,
    end_frame: half-open frames of a video that its tokens cover together; 0 and 1 for an image.
    """

    name: str
    first_frame: int = 0
    end_frame: int = 1


@dataclass(frozen=True, kw_only=True)
class Patches:
    """The visual tokens of one image or video, in prompt order.

    panels: in the order of their first tokens. panel: [n] int64, the panel of each token.
    boxes: [n, 4] float64, left, top, right, bottom in pixels of the original picture, x to the
    right and y down from its top left corner; NaN for tokens that cover no part of it (newlines,
    padding, class tokens).
    """

    panels: tuple[Panel, ...]
    panel: np.ndarray
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.panel)

    @property
    def covers(self) -> np.ndarray:
        """[n] bool: which tokens cover part of the picture."""
        return ~np.isnan(self.boxes[:, 0])


def grid_boxes(columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[rows, columns, 4]: boxes of a grid, row by row.

    columns: [columns, 2], left and right of each; rows: [rows, 2], top and bottom of each; NaN
    where one lies outside the picture.
    """
    boxes = np.full((len(rows), len(columns), 4), np.nan)
    boxes[..., 0], boxes[..., 2] = columns[:, 0], columns[:, 1]
    boxes[..., 1], boxes[..., 3] = rows[:, None, 0], rows[:, None, 1]
    boxes[np.isnan(boxes).any(axis=-1)] = np.nan
    return boxes
