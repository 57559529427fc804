"""Visual tokens of one image, as far as a model's config says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_reroute.families.table import family_of
from vllm_reroute.schedule.budget import REFERENCE_VISUAL_TOKENS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Towers with a fixed grid -> tokens they have besides it; others (Pixtral) vary with the image."""


def fixed_visual_tokens(hf_config: PretrainedConfig) -> int | None:
    """Tokens of every image for a family with a fixed grid; None where images vary."""
    family = family_of((getattr(hf_config, "architectures", None) or [""])[0])
    if family is None or not family.fixed_grid:
        return None
    vision = hf_config.vision_config
    if vision.model_type not in CLASS_TOKENS:
        return None
    whole = getattr(hf_config, "vision_feature_select_strategy", "default") == "full"
    return (vision.image_size // vision.patch_size) ** 2 + whole * CLASS_TOKENS[vision.model_type]


def visual_tokens_per_image(hf_config: PretrainedConfig) -> int:
    """Tokens of one image for towers with a fixed grid; the reference image's otherwise."""
    return fixed_visual_tokens(hf_config) or REFERENCE_VISUAL_TOKENS
