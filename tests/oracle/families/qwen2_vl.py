"""Qwen2-VL: features of merged patches, M-RoPE positions. Also what Qwen2.5-VL has in common with it."""

from collections.abc import Mapping

from torch import Tensor, nn

from .mrope import rope_index
from .prompt import Prompt, embed, joined, nothing


def prepare(model: nn.Module, inputs: Mapping[str, Tensor]) -> Prompt:
    """inputs: input_ids [1, tokens]; pixel_values [patches, ...], image_grid_thw [images, 3], and the same of videos
    (pixel_values_videos, video_grid_thw)."""
    images = videos = nothing(model)
    if "pixel_values" in inputs:
        seen = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        images = joined(seen.pooler_output)
    if "pixel_values_videos" in inputs:
        seen = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        videos = joined(seen.pooler_output)
    features = {model.config.image_token_id: images, model.config.video_token_id: videos}
    embeddings, visual = embed(model, inputs["input_ids"][0], features)
    positions, next_position = rope_index(model, inputs)
    return Prompt(
        embeddings=embeddings, visual=visual, positions=positions, next_position=next_position
    )
