"""LLaVA-1.5: one square look at each image, usually its centre."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_reroute.explain.geometry.axis import Axis, in_row
from vllm_reroute.explain.geometry.patches import Panel, Patches, grid_boxes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def image_patches(
    config: PretrainedConfig, image_processor: Any, width: int, height: int
) -> Patches:
    """Patches of an image of width x height pixels; a class token, if kept, covers none.

    image_processor: transformers' one of CLIP, SigLIP or LLaVA.
    """
    columns, rows = _canvas(image_processor, Axis.of(width), Axis.of(height))
    side = config.vision_config.image_size // config.vision_config.patch_size
    grid = in_row(side, config.vision_config.patch_size)
    boxes = grid_boxes(columns.in_picture(grid), rows.in_picture(grid)).reshape(-1, 4)
    if _has_class_token(config):
        boxes = np.concatenate((np.full((1, 4), np.nan), boxes))
    return Patches(
        panels=(Panel(name=""),), panel=np.zeros(len(boxes), dtype=np.int64), boxes=boxes
    )


def _canvas(processor: Any, columns: Axis, rows: Axis) -> tuple[Axis, Axis]:
    """The steps of transformers' CLIP, SigLIP and LLaVA processors, in their order."""
    size, crop = processor.size, processor.crop_size
    if getattr(processor, "do_pad", False):
        longest = int(max(columns.length, rows.length))
        columns, rows = (
            axis.framed(int(longest - axis.length) // 2, longest) for axis in (columns, rows)
        )
    if processor.do_resize:
        if size.shortest_edge:
            # The long side is rounded down, as transformers' get_resize_output_image_size does.
            shortest = min(columns.length, rows.length)
            columns, rows = (
                axis.resized(int(size.shortest_edge * axis.length / shortest))
                for axis in (columns, rows)
            )
        else:
            columns, rows = columns.resized(size.width), rows.resized(size.height)
    if processor.do_center_crop:
        columns, rows = _cropped(columns, crop.width), _cropped(rows, crop.height)
    return columns, rows


def _cropped(axis: Axis, length: int) -> Axis:
    """The middle of a long axis; the middle of black padding for a short one."""
    missing = length - int(axis.length)
    return axis.framed(missing // 2 if missing > 0 else -(-missing // 2), length)


def _has_class_token(config: PretrainedConfig) -> bool:
    clip = config.vision_config.model_type == "clip_vision_model"
    return clip and config.vision_feature_select_strategy == "full"
