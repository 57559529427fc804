"""Qwen3-VL: DeepStack features of each image and frame, which the first decoder layers add; timestamps are text."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig

from .mrope import rope_index
from .prompt import Prompt, embed, joined, nothing, put


def num_deepstack_levels(config: Qwen3VLConfig) -> int:
    return len(config.vision_config.deepstack_visual_indexes)


def prepare(model: nn.Module, inputs: Mapping[str, Tensor]) -> Prompt:
    """inputs: input_ids [1, tokens]; pixel_values [patches, ...], image_grid_thw [images, 3], and the same of videos
    (pixel_values_videos, video_grid_thw)."""
    input_ids = inputs["input_ids"][0]
    levels = num_deepstack_levels(model.config)
    images = videos = [nothing(model)] * (1 + levels)
    if "pixel_values" in inputs:
        seen = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        images = [joined(part) for part in (seen.pooler_output, *seen.deepstack_features)]
    if "pixel_values_videos" in inputs:
        seen = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        videos = [joined(part) for part in (seen.pooler_output, *seen.deepstack_features)]
    image_token, video_token = model.config.image_token_id, model.config.video_token_id
    embeddings, visual = embed(model, input_ids, {image_token: images[0], video_token: videos[0]})
    deepstack = []
    for level in range(1, levels + 1):
        added = torch.zeros_like(embeddings)
        put(added, input_ids == image_token, images[level])
        put(added, input_ids == video_token, videos[level])
        deepstack.append(added)
    positions, next_position = rope_index(model, inputs)
    return Prompt(
        embeddings=embeddings,
        visual=visual,
        positions=positions,
        next_position=next_position,
        deepstack=deepstack,
    )
