"""LLaVA-NeXT and LLaVA-OneVision: an overview of the whole image, then its tiles.

The image is fitted into the best of a list of resolutions, padded, cut into tiles, and the tiles'
features are put together again: rows and columns of nothing but padding are dropped, and a newline
follows each row (https://llava-vl.github.io/blog/2024-01-30-llava-next).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_reroute.explain.geometry.axis import Axis
from vllm_reroute.explain.geometry.patches import Panel, Patches, grid_boxes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OVERVIEW, TILES = Panel(name="overview"), Panel(name="tiles")

ONEVISION_MOST_TILES = 9
"""vLLM pools more than so many tiles' worth of features (`anyres_max_9`), whatever the config says."""
_POOLED_FROM = 1.1
_FRAME_STRIDE = 2


@dataclass(frozen=True)
class _Tower:
    """pixels: a side of what the vision tower sees. patch: a side of its patches."""

    pixels: int
    patch: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> _Tower:
        return cls(config.vision_config.image_size, config.vision_config.patch_size)

    @property
    def side(self) -> int:
        """Patches along a side; what is left over at the end no patch sees."""
        return self.pixels // self.patch

    def intervals(self, edges: np.ndarray) -> np.ndarray:
        """[n, 2] canvas pixels between ascending `edges` [n + 1], counted in patches over tiles."""
        return np.stack(
            (self._pixel(edges[:-1], np.floor), self._pixel(edges[1:], lambda t: np.ceil(t) - 1)),
            axis=1,
        )

    def _pixel(self, edges: np.ndarray, tile_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        tile = tile_of(edges / self.side)
        return tile * self.pixels + (edges - tile * self.side) * self.patch


def next_image_patches(config: PretrainedConfig, width: int, height: int) -> Patches:
    """LLaVA-NeXT's patches of an image of width x height pixels."""
    return _image_patches(config, width, height, most_tiles=None)


def onevision_image_patches(config: PretrainedConfig, width: int, height: int) -> Patches:
    """LLaVA-OneVision's patches of an image of width x height pixels."""
    return _image_patches(config, width, height, most_tiles=ONEVISION_MOST_TILES)


def onevision_video_patches(
    config: PretrainedConfig, width: int, height: int, num_frames: int
) -> Patches:
    """Every frame stretched to a square and pooled; one newline after the last."""
    tower = _Tower.of(config)
    pooled = math.ceil(tower.side / _FRAME_STRIDE)
    of_frame = _square_boxes(tower, np.linspace(0, tower.side, pooled + 1), width, height)
    boxes = np.concatenate((np.tile(of_frame, (num_frames, 1)), np.full((1, 4), np.nan)))
    panel = np.append(np.repeat(np.arange(num_frames), len(of_frame)), num_frames - 1)
    panels = tuple(Panel(name="", first_frame=f, end_frame=f + 1) for f in range(num_frames))
    return Patches(panels=panels, panel=panel, boxes=boxes)


def _image_patches(
    config: PretrainedConfig, width: int, height: int, most_tiles: int | None
) -> Patches:
    tower = _Tower.of(config)
    overview = _square_boxes(tower, np.arange(tower.side + 1), width, height)
    tiles = _tile_boxes(config, tower, width, height, most_tiles)
    newlines = np.full((len(tiles), 1, 4), np.nan)
    tiles = np.concatenate((tiles, newlines), axis=1).reshape(-1, 4)
    return Patches(
        panels=(OVERVIEW, TILES),
        panel=np.repeat([0, 1], [len(overview), len(tiles)]),
        boxes=np.concatenate((overview, tiles)),
    )


def _square_boxes(tower: _Tower, edges: np.ndarray, width: int, height: int) -> np.ndarray:
    """[n, 4]: of the whole picture, stretched to the tower's square. edges: counted in patches."""
    grid = tower.intervals(edges)
    columns, rows = (Axis.of(size).resized(tower.pixels) for size in (width, height))
    return grid_boxes(columns.in_picture(grid), rows.in_picture(grid)).reshape(-1, 4)


def _tile_boxes(
    config: PretrainedConfig, tower: _Tower, width: int, height: int, most_tiles: int | None
) -> np.ndarray:
    """[rows, columns, 4]: of the tiles' features that reach the decoder."""
    from transformers.image_processing_utils import select_best_resolution

    # Height first, here as in the published list of resolutions.
    sizes = (height, width)
    canvas = select_best_resolution(sizes, config.image_grid_pinpoints)
    cells = tuple(length // tower.pixels * tower.side for length in canvas)
    axes = _fitted(sizes, canvas)
    kept = _without_padding(sizes, cells)
    counts = [end - first for first, end in kept]
    if most_tiles is not None:
        shrink = math.sqrt(counts[0] * counts[1] / (most_tiles * tower.side**2))
        if shrink > _POOLED_FROM:
            counts = [int(count // shrink) for count in counts]
    rows, columns = (
        axis.in_picture(tower.intervals(np.linspace(first, end, count + 1)))
        for axis, (first, end), count in zip(axes, kept, counts, strict=True)
    )
    return grid_boxes(columns, rows)


def _fitted(sizes: tuple[int, int], canvas: tuple[int, int]) -> list[Axis]:
    """The picture as large as the canvas allows, in its middle."""
    by = [length / size for length, size in zip(canvas, sizes, strict=True)]
    tight = by.index(min(by))
    axes = []
    for axis, (size, length) in enumerate(zip(sizes, canvas, strict=True)):
        fitted = length if axis == tight else min(math.ceil(size * by[tight]), length)
        axes.append(Axis.of(size).resized(fitted).framed((length - fitted) // 2, length))
    return axes


def _without_padding(sizes: tuple[int, int], cells: tuple[int, int]) -> list[tuple[int, int]]:
    """First and end of the rows and of the columns that are left, as vLLM's `unpad_image` cuts."""
    (height, width), (num_rows, num_columns) = sizes, cells
    if width / height > num_columns / num_rows:
        padding = (num_rows - int(round(height * (num_columns / width), 7))) // 2
        return [(padding, num_rows - padding), (0, num_columns)]
    padding = (num_columns - int(round(width * (num_rows / height), 7))) // 2
    return [(0, num_rows), (padding, num_columns - padding)]
