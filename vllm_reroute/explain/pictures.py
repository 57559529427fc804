"""The images and videos a request is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image, or the sampled frames of one video.

    name: its file's. frames: RGB, all of one size. metadata: of a video, the fields of transformers'
    `VideoMetadata`; None for an image.
    """

    name: str
    frames: tuple[Image.Image, ...]
    metadata: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def is_video(self) -> bool:
        return self.metadata is not None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.frames[0].size

    def as_array(self) -> np.ndarray:
        """[frames, height, width, 3] uint8."""
        return np.stack([np.asarray(frame) for frame in self.frames])


def load_image(path: Path) -> Picture:
    """The image as vLLM's server hands it to a model: upright, transparency on white.

    Raises ValueError for what is no image, OSError for what cannot be read.
    """
    data = path.read_bytes()
    from vllm.multimodal.media.image import ImageMediaIO

    try:
        image = ImageMediaIO().load_bytes(data).media
    except ValueError as error:
        raise ValueError(
            f"--image {path} cannot be read as an image ({error}). Give a PNG, JPEG, WebP or the like."
        ) from error
    return image_of(path.name, image)


def image_of(name: str, image: Image.Image) -> Picture:
    """An image that is in memory already."""
    return Picture(name=name, frames=(image.convert("RGB"),))


def load_video(path: Path, num_frames: int) -> Picture:
    """At most `num_frames` frames, evenly chosen by vLLM's own loader.

    Raises ValueError for what is no video, OSError for what cannot be read.
    """
    data = path.read_bytes()
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    try:
        frames, metadata = VIDEO_LOADER_REGISTRY.load("opencv").load_bytes(
            data, num_frames=num_frames
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--video {path} is no video that can be read ({error}). Give an MP4, WebM or the like."
        ) from error
    return video_of(path.name, np.asarray(frames), metadata)


def video_of(name: str, frames: np.ndarray, metadata: Mapping[str, Any]) -> Picture:
    """A video whose frames [frames, height, width, 3] uint8 have been sampled already.

    metadata: of the whole video, `frames_indices` saying which frames these are.
    """
    return Picture(
        name=name,
        frames=tuple(Image.fromarray(frame) for frame in frames),
        metadata={k: v for k, v in metadata.items() if k != "do_sample_frames"},
    )
