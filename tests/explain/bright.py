"""Black pictures with one bright place, and which visual tokens a processor makes bright of them.

Brightness takes the way that pixels take: the family's real processor, then vLLM's own code for
putting tiles together and pooling, on one "feature" per patch: the mean of its pixels.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from vllm_reroute.explain.geometry import Patches
from vllm_reroute.explain.pictures import Picture, image_of, video_of

NEWLINE = -1.0
"""Stands for tokens that are made of no pixels."""


def box_at(width: int, height: int, place: tuple[float, float], share: float) -> tuple[int, ...]:
    """A rectangle of `share` of either side, its centre at `place` in shares of the sides."""
    size = (max(1, round(width * share)), max(1, round(height * share)))
    left = min(max(0, round(width * place[0] - size[0] / 2)), width - size[0])
    top = min(max(0, round(height * place[1] - size[1] / 2)), height - size[1])
    return (left, top, left + size[0], top + size[1])


def bright_image(width: int, height: int, box: tuple[int, ...]) -> Picture:
    return image_of("bright.png", _frame(width, height, box))


def bright_video(width: int, height: int, boxes: list[tuple[int, ...] | None]) -> Picture:
    """One frame per box; None for a black one."""
    frames = np.stack([np.asarray(_frame(width, height, box)) for box in boxes])
    times = {"total_num_frames": len(boxes), "fps": 2.0, "frames_indices": list(range(len(boxes)))}
    return video_of("bright.mp4", frames, times)


def _frame(width: int, height: int, box: tuple[int, ...] | None) -> Image.Image:
    image = Image.new("RGB", (width, height))
    if box is not None:
        left, top, right, bottom = box
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill="white")
    return image


def brightness_of(config: Any, processor: Any, pictures: list[Picture]) -> list[np.ndarray]:
    """Per picture, [tokens]: how bright what each token is made of is, 0 to 1; `NEWLINE`."""
    return [_BRIGHTNESS[config.model_type](config, processor, picture) for picture in pictures]


def expected_brightness(patches: Patches, boxes: list[tuple[int, ...] | None]) -> np.ndarray:
    """[tokens]: the share of what geometry says a token covers that is bright. boxes: per frame.

    Where a token's patch reaches into the padding its box is cut off at the picture's edge, but
    the padding is part of what the token is made of.
    """
    sides = patches.boxes[:, 2:] - patches.boxes[:, :2]
    whole = [np.nanmax(sides[patches.panel == p], axis=0) for p in range(len(patches.panels))]
    expected = np.zeros(len(patches))
    for token in np.flatnonzero(patches.covers):
        panel = patches.panel[token]
        frames = range(patches.panels[panel].first_frame, patches.panels[panel].end_frame)
        bright = [_bright_area(patches.boxes[token], boxes[frame]) for frame in frames]
        expected[token] = np.mean(bright) / whole[panel].prod()
    return expected


def _bright_area(box: np.ndarray, bright: tuple[int, ...] | None) -> float:
    if bright is None:
        return 0.0
    width, height = (min(box[i + 2], bright[i + 2]) - max(box[i], bright[i]) for i in (0, 1))
    return max(0.0, width) * max(0.0, height)


def _light(sub: Any, pixels: torch.Tensor, channels: int) -> torch.Tensor:
    """Normalised pixels as light from 0 to 1. channels: the dimension they are in."""
    shape = [1] * pixels.ndim
    shape[channels] = 3
    mean, std = (torch.tensor(v).view(shape) for v in (sub.image_mean, sub.image_std))
    return pixels * std + mean


def _of_tiles(config: Any, sub: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[tiles, patches, 1]: what the vision tower's convolution sees, patch by patch."""
    patch = config.vision_config.patch_size
    side = config.vision_config.image_size // patch
    light = _light(sub, pixels, channels=1)[:, :, : side * patch, : side * patch]
    cells = light.reshape(len(light), 3, side, patch, side, patch)
    return cells.mean(dim=(1, 3, 5)).reshape(len(light), side * side, 1)


def _llava(config: Any, processor: Any, picture: Picture) -> np.ndarray:
    sub = processor.image_processor
    pixels = sub(images=list(picture.frames), return_tensors="pt")["pixel_values"]
    return _of_tiles(config, sub, pixels)[0, :, 0].numpy()


def _anyres(config: Any, processor: Any, picture: Picture) -> np.ndarray:
    from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
    from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration

    newline = torch.tensor([NEWLINE])
    model = SimpleNamespace(config=config, image_newline=newline)
    if picture.is_video:
        sub = processor.video_processor
        inputs = sub(videos=[picture.as_array()], do_sample_frames=False, return_tensors="pt")
        cells = _of_tiles(config, sub, inputs["pixel_values_videos"][0])
        pooled = LlavaOnevisionForConditionalGeneration.apply_pooling(model, cells)
        return np.append(pooled.flatten().numpy(), NEWLINE)
    sub = processor.image_processor
    inputs = sub(images=list(picture.frames), return_tensors="pt")
    cells = _of_tiles(config, sub, inputs["pixel_values"][0])
    options: dict[str, Any] = {"strategy": "spatial_unpad"}
    routed = LlavaNextForConditionalGeneration
    if config.model_type == "llava_onevision":
        routed, options = (
            LlavaOnevisionForConditionalGeneration,
            {**options, "image_newline": newline},
        )
    merged = routed._merge_image_patch_embeddings(model, inputs["image_sizes"][0], cells, **options)
    return merged[:, 0].numpy()


def _qwen(config: Any, processor: Any, picture: Picture) -> np.ndarray:
    if picture.is_video:
        sub = processor.video_processor
        inputs = sub(
            videos=[picture.as_array()],
            do_sample_frames=False,
            video_metadata=[picture.metadata],
            return_tensors="pt",
        )
        pixels = inputs["pixel_values_videos"]
    else:
        sub = processor.image_processor
        pixels = sub(images=list(picture.frames), return_tensors="pt")["pixel_values"]
    # The merger takes in patches that follow each other.
    of_token = pixels.view(-1, sub.merge_size**2, 3, pixels.shape[1] // 3)
    return _light(sub, of_token, channels=2).mean(dim=(1, 2, 3)).numpy()


_BRIGHTNESS = {
    "llava": _llava,
    "llava_next": _anyres,
    "llava_onevision": _anyres,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
}
