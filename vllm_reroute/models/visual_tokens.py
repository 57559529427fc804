"""Visual tokens of one image, as far as a model's config says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_reroute.config.budget import REFERENCE_VISUAL_TOKENS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def visual_tokens_per_image(hf_config: PretrainedConfig) -> int:
    """Tokens of one image for towers with a fixed grid; the reference image's otherwise."""
    vision = getattr(hf_config, "vision_config", None)
    image_size, patch_size = (getattr(vision, n, None) for n in ("image_size", "patch_size"))
    if not isinstance(image_size, int) or not isinstance(patch_size, int):
        return REFERENCE_VISUAL_TOKENS
    return (image_size // patch_size) ** 2
