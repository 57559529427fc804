"""Requests with photographs and short videos, as each family's own processor prepares them."""

from collections.abc import Mapping

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin
from transformers.video_utils import VideoMetadata

from benchmarks.photos import PHOTOS

IMAGE = {"qwen": "<|vision_start|><|image_pad|><|vision_end|>", "llava": "<image>"}
VIDEO = {"qwen": "<|vision_start|><|video_pad|><|vision_end|>", "llava": "<video>"}

# Name -> what the user sends, in order: an image or a video by number, or text.
REQUESTS: dict[str, tuple[str, ...]] = {
    "image": ("image 0", "What is shown here?"),
    "two images": ("first", "image 1", "and then", "image 0", "which has the cat?"),
    "video": ("video 0", "What happens?"),
    "image and video": ("look at", "image 1", "and at", "video 1", "what is new?"),
    "two videos": ("video 0", "or", "video 1", "?"),
    "text": ("Count the birds over the field.",),
}
WITHOUT_VIDEO = ("image", "two images", "text")
FRAMES_PER_SECOND = 2.0


def image(number: int) -> Image.Image:
    """Photographs of different aspect."""
    return PHOTOS[number].image.crop((60, 20, 360 + 60 * number, 300))


def video(number: int) -> np.ndarray:
    """A window that moves over a photograph: [frames, height, width, 3]."""
    picture = np.asarray(PHOTOS[number].image)
    return np.stack([picture[20 + 12 * t : 160 + 12 * t, 40 : 208 + 56 * number] for t in range(4)])


def prepared(
    processor: ProcessorMixin,
    family: str,
    parts: tuple[str, ...],
    videos: list[np.ndarray] | None = None,
) -> Mapping[str, Tensor]:
    """The processor's output for one request. videos: instead of those that the parts name."""
    style = family.split("-")[0].rstrip("0123456789.")
    spelled, images, named = [], [], []
    for part in parts:
        kind, _, number = part.partition(" ")
        if kind == "image" and number.isdigit():
            images.append(image(int(number)))
            part = IMAGE[style]
        elif kind == "video" and number.isdigit():
            named.append(video(int(number)))
            part = VIDEO[style]
        spelled.append(part)
    options: dict[str, object] = {"images": images} if images else {}
    if named:
        options |= _with_times(style, videos or named)
    text = f"USER: {' '.join(spelled)} ASSISTANT:"
    return processor(text=[text], return_tensors="pt", **options)


def _with_times(style: str, videos: list[np.ndarray]) -> dict[str, object]:
    options: dict[str, object] = {"videos": videos}
    if style == "qwen":
        options["do_sample_frames"] = False
        options["video_metadata"] = [
            VideoMetadata(
                total_num_frames=len(frames),
                fps=FRAMES_PER_SECOND,
                frames_indices=list(range(len(frames))),
            )
            for frames in videos
        ]
    return options
