"""LLaVA-OneVision: images as in LLaVA-NeXT, shrunk where they are large; videos of pooled frames and one newline.

Every image is cut into tiles, as processors called with a flat list of images do it. Newlines stand
at placeholders and are visual tokens like any other.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from .prompt import Prompt, embed, in_sequence, joined, nothing


def prepare(model: nn.Module, inputs: Mapping[str, Tensor]) -> Prompt:
    """inputs: input_ids [1, tokens]; pixel_values [images, tiles, 3, height, width], image_sizes [images, 2];
    pixel_values_videos [videos, frames, 3, height, width]."""
    images = videos = nothing(model)
    if "pixel_values" in inputs:
        pixels = inputs["pixel_values"].to(model.dtype)
        images = joined(model.get_image_features(pixels, inputs["image_sizes"]).pooler_output)
    if "pixel_values_videos" in inputs:
        pixels = inputs["pixel_values_videos"].to(model.dtype)
        videos = joined(model.get_video_features(pixels).pooler_output)
    features = {model.config.image_token_id: images, model.config.video_token_id: videos}
    return in_sequence(*embed(model, inputs["input_ids"][0], features))
