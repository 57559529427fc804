"""The one table of how each family looks at pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_reroute.explain.geometry import anyres, llava, qwen
from vllm_reroute.explain.geometry.patches import Patches
from vllm_reroute.families.table import family_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin

    from vllm_reroute.explain.pictures import Picture

FIXED_TOWERS = ("clip_vision_model", "siglip_vision_model")


def patches_of(
    config: PretrainedConfig, processor: ProcessorMixin, pictures: Sequence[Picture]
) -> list[Patches]:
    """Patches of each picture of a request, in prompt order.

    config, processor: the checkpoint's own, from transformers.
    Raises ValueError for models whose patches are not known.
    """
    family = family_of((config.architectures or [""])[0])
    if family is None or family.architecture not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise ValueError(
            f"explain does not know where the patches of {(config.architectures or ['?'])[0]} are. "
            f"Known: {known}."
        )
    return [_FAMILIES[family.architecture](config, processor, picture) for picture in pictures]


def _llava(config: PretrainedConfig, processor: ProcessorMixin, picture: Picture) -> Patches:
    _check_tower(config)
    _check_image(config, picture)
    return llava.image_patches(config, processor.image_processor, *picture.size)


def _llava_next(config: PretrainedConfig, processor: ProcessorMixin, picture: Picture) -> Patches:
    _check_tower(config)
    _check_image(config, picture)
    return anyres.next_image_patches(config, *picture.size)


def _llava_onevision(
    config: PretrainedConfig, processor: ProcessorMixin, picture: Picture
) -> Patches:
    _check_tower(config)
    if picture.is_video:
        return anyres.onevision_video_patches(config, *picture.size, len(picture.frames))
    return anyres.onevision_image_patches(config, *picture.size)


def _qwen(config: PretrainedConfig, processor: ProcessorMixin, picture: Picture) -> Patches:
    """The processor itself says which grid it makes: its rules differ between the versions."""
    if picture.is_video:
        inputs = processor.video_processor(
            videos=[picture.as_array()],
            do_sample_frames=False,
            video_metadata=[picture.metadata],
            return_tensors="np",
        )
        grid, sub = inputs["video_grid_thw"][0], processor.video_processor
    else:
        inputs = processor.image_processor(images=[picture.frames[0]], return_tensors="np")
        grid, sub = inputs["image_grid_thw"][0], processor.image_processor
    times, rows, columns = (int(number) for number in grid)
    return qwen.grid_patches(
        (times, rows, columns),
        sub.merge_size,
        sub.temporal_patch_size,
        *picture.size,
        len(picture.frames),
    )


def _check_tower(config: PretrainedConfig) -> None:
    if config.vision_config.model_type not in FIXED_TOWERS:
        raise ValueError(
            f"explain does not know where the patches of a {config.vision_config.model_type} vision "
            f"tower are. Known: {', '.join(FIXED_TOWERS)}, and those of Qwen-VL."
        )


def _check_image(config: PretrainedConfig, picture: Picture) -> None:
    if picture.is_video:
        assert config.architectures, "it named the family"
        raise ValueError(
            f"--video {picture.name}: {config.architectures[0]} takes images only. Give --image, or "
            "choose a model that takes videos: Qwen-VL or LLaVA-OneVision."
        )


_FAMILIES = {
    "LlavaForConditionalGeneration": _llava,
    "LlavaNextForConditionalGeneration": _llava_next,
    "LlavaOnevisionForConditionalGeneration": _llava_onevision,
    "Qwen2VLForConditionalGeneration": _qwen,
    "Qwen2_5_VLForConditionalGeneration": _qwen,
    "Qwen3VLForConditionalGeneration": _qwen,
}
"""Stock architecture -> patches of one picture."""
