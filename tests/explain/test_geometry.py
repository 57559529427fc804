"""A token that is made of bright pixels is drawn where the picture is bright, for every family.

Not only the brightest: each token's brightness, measured behind the real processor, must be the
share of its rectangle that is bright. A rectangle off by a hundredth of a patch shows.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import (
    AutoConfig,
    AutoProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    LlavaOnevisionImageProcessor,
    PixtralVisionConfig,
    SiglipImageProcessor,
)

from tests.explain.bright import (
    NEWLINE,
    box_at,
    bright_image,
    bright_video,
    brightness_of,
    expected_brightness,
)
from tests.explain.conftest import SEEDED
from vllm_reroute.explain.geometry import Patches, patches_of

FAMILIES = ("llava", *SEEDED)
WITH_VIDEO = FAMILIES[2:]
SIZES = ((300, 200), (160, 420), (640, 120), (97, 211), (500, 500), (61, 59))
PLACES = tuple(itertools.product((0.1, 0.5, 0.85), (0.15, 0.5, 0.9)))
# Resizing blurs an edge a little; bilinear pooling reads its cell's middle, not all of it.
EXACT, POOLED = 0.01, 0.15
# Smaller than patch times patches: the towers of published checkpoints leave pixels over too.
LEFT_OVER = 46


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, tuple[Any, Any]]:
    """Family -> config and processor of a small checkpoint."""
    return {
        family: (AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder))
        for family, folder in folders.items()
    }


def check(patches: Patches, brightness: np.ndarray, boxes: list[Any], tolerance: float) -> None:
    assert len(patches) == len(brightness)
    assert not patches.covers[brightness == NEWLINE].any()
    # What covers nothing else is made of black padding.
    assert brightness[~patches.covers].max(initial=0) < EXACT
    expected = expected_brightness(patches, boxes)
    assert np.abs(expected - brightness)[patches.covers].max() < tolerance
    # Something is bright, and nearly all of the light is inside the rectangles that touch it.
    light = np.where(patches.covers, brightness, 0)
    assert light.sum() > 0.2
    assert light[expected > 0].sum() > (1 - 2 * tolerance) * light.sum()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bright_place_of_an_image(
    models: dict[str, tuple[Any, Any]], family: str, size: tuple[int, int]
) -> None:
    pooled = family == "llava-onevision"
    config, processor = models[family]
    seen = 0
    for place in PLACES:
        box = box_at(*size, place, 0.3)
        picture = bright_image(*size, box)
        (patches,), (brightness,) = (
            of(config, processor, [picture]) for of in (patches_of, brightness_of)
        )
        if brightness.max() > 0.1:  # LLaVA-1.5 crops some of these places away.
            check(patches, brightness, [box], POOLED if pooled else EXACT)
            seen += 1
        else:
            assert expected_brightness(patches, [box]).max() < 0.1
    assert seen == len(PLACES) or (family == "llava" and seen >= 3)


@pytest.mark.parametrize("num_frames", [4, 5])
@pytest.mark.parametrize("family", WITH_VIDEO)
def test_bright_frame_of_a_video(
    models: dict[str, tuple[Any, Any]], family: str, num_frames: int
) -> None:
    """Both where and when; an odd last frame is a moment of its own."""
    config, processor = models[family]
    for size, frame in itertools.product(((300, 200), (160, 420)), range(num_frames)):
        boxes: list[Any] = [None] * num_frames
        boxes[frame] = box_at(*size, (0.3, 0.6), 0.3)
        video = bright_video(*size, boxes)
        (patches,), (brightness,) = (
            of(config, processor, [video]) for of in (patches_of, brightness_of)
        )
        check(patches, brightness, boxes, POOLED if "onevision" in family else EXACT)
        lit = patches.panels[patches.panel[brightness.argmax()]]
        assert lit.first_frame <= frame < lit.end_frame


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_one_request_are_apart(models: dict[str, tuple[Any, Any]], family: str) -> None:
    """As the processor takes them, all at once: each has its own size and its own bright place."""
    config, processor = models[family]
    boxes = [box_at(300, 200, (0.5, 0.3), 0.4), box_at(160, 420, (0.5, 0.6), 0.3)]
    pictures = [bright_image(300, 200, boxes[0]), bright_image(160, 420, boxes[1])]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(
        text=[text], images=[picture.frames[0] for picture in pictures], return_tensors="pt"
    )
    token = getattr(config, "image_token_id", None) or config.image_token_index
    patches = patches_of(config, processor, pictures)
    assert sum(map(len, patches)) == int((inputs["input_ids"] == token).sum())
    brightness = brightness_of(config, processor, pictures)
    for of_one, light, box in zip(patches, brightness, boxes, strict=True):
        check(of_one, light, [box], POOLED if "onevision" in family else EXACT)


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def left_over(kind: type, **options: Any) -> Any:
    """A processor for a tower that is no whole number of patches wide."""
    pinpoints = [[LEFT_OVER * h, LEFT_OVER * w] for h in (1, 2, 3) for w in (1, 2, 3)]
    return kind(image_grid_pinpoints=pinpoints, **options)


# Name -> family, image processor, and what its config says otherwise.
VARIANTS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "padded to a square": (
        "llava",
        # Padding has the mean's colour: black.
        LlavaImageProcessor(
            size={"shortest_edge": 168},
            crop_size=square(168),
            do_pad=True,
            image_mean=[0.0, 0.0, 0.0],
            image_std=[1.0, 1.0, 1.0],
        ),
        {},
    ),
    "stretched to a square": ("llava", SiglipImageProcessor(size=square(168)), {}),
    "cropped beyond the image": (
        "llava",
        CLIPImageProcessor(size={"shortest_edge": 120}, crop_size=square(168)),
        {},
    ),
    "LLaVA-NeXT with pixels left over": (
        "llava-next",
        left_over(
            LlavaNextImageProcessor, size={"shortest_edge": LEFT_OVER}, crop_size=square(LEFT_OVER)
        ),
        {"image_size": LEFT_OVER},
    ),
    "LLaVA-OneVision with pixels left over": (
        "llava-onevision",
        left_over(LlavaOnevisionImageProcessor, size=square(LEFT_OVER)),
        {"image_size": LEFT_OVER},
    ),
}


@pytest.mark.parametrize("size", ((300, 200), (97, 211), (401, 160)), ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_other_preparations(
    models: dict[str, tuple[Any, Any]], name: str, size: tuple[int, int]
) -> None:
    family, image_processor, vision = VARIANTS[name]
    config = type(models[family][0]).from_dict(models[family][0].to_dict())
    config.vision_config.update(vision)
    if vision:
        config.image_grid_pinpoints = image_processor.image_grid_pinpoints
    processor = SimpleNamespace(image_processor=image_processor)
    box = box_at(*size, (0.55, 0.4), 0.3)
    picture = bright_image(*size, box)
    (patches,), (brightness,) = (
        of(config, processor, [picture]) for of in (patches_of, brightness_of)
    )
    check(patches, brightness, [box], EXACT)


def test_class_token_covers_nothing(models: dict[str, tuple[Any, Any]]) -> None:
    config = type(models["llava"][0]).from_dict(models["llava"][0].to_dict())
    processor = models["llava"][1]
    (without,) = patches_of(config, processor, [bright_image(300, 200, (0, 0, 9, 9))])
    config.vision_feature_select_strategy = "full"
    (patches,) = patches_of(config, processor, [bright_image(300, 200, (0, 0, 9, 9))])
    assert patches.covers.tolist() == [False, *without.covers.tolist()]
    assert np.array_equal(patches.boxes[1:], without.boxes, equal_nan=True)


@pytest.mark.parametrize("family", ["llava", "llava-next"])
def test_video_where_there_are_none(models: dict[str, tuple[Any, Any]], family: str) -> None:
    with pytest.raises(ValueError, match=r"--video bright\.mp4.*images only.*LLaVA-OneVision"):
        patches_of(*models[family], [bright_video(30, 20, [None, None])])


def test_unknown_tower(models: dict[str, tuple[Any, Any]]) -> None:
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(), architectures=["LlavaForConditionalGeneration"]
    )
    with pytest.raises(ValueError, match=r"pixtral vision tower.*clip_vision_model"):
        patches_of(config, models["llava"][1], [bright_image(30, 20, (0, 0, 9, 9))])
