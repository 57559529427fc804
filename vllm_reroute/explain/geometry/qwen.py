"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the whole picture, stretched a little, in merged patches."""

from __future__ import annotations

import numpy as np

from vllm_reroute.explain.geometry.axis import in_row
from vllm_reroute.explain.geometry.patches import Panel, Patches, grid_boxes


def grid_patches(
    grid: tuple[int, int, int], merge: int, temporal: int, width: int, height: int, num_frames: int
) -> Patches:
    """Patches of an image or video of width x height pixels.

    grid: times, rows and columns of patches, `image_grid_thw` or `video_grid_thw` of the
    processor. merge: patches a token takes in along either side. temporal: frames it takes in; the
    last frame is repeated where they do not come out even.
    """
    times, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    of_time = grid_boxes(in_row(columns, width / columns), in_row(rows, height / rows))
    boxes = np.tile(of_time.reshape(-1, 4), (times, 1))
    panels = tuple(
        Panel(name="", first_frame=t * temporal, end_frame=min((t + 1) * temporal, num_frames))
        for t in range(times)
    )
    return Patches(panels=panels, panel=np.repeat(np.arange(times), rows * columns), boxes=boxes)
