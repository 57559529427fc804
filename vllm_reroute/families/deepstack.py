"""Families that add image features between the first decoder layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def first_decision_layer(hf_config: PretrainedConfig) -> int:
    """The lowest decision layer a model allows.

    Layer 0 has nothing to score with. Deepstack (Qwen3-VL, arXiv 2511.21631) adds one more set of
    image features after each of the layers 0, 1, …: routing starts once all of them are in, so
    that no visual token misses one.
    """
    vision = getattr(hf_config, "vision_config", None)
    return max(1, len(getattr(vision, "deepstack_visual_indexes", None) or ()))
