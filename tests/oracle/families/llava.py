"""LLaVA-1.5: one feature per patch of the image."""

from collections.abc import Mapping

from torch import Tensor, nn

from .prompt import Prompt, embed, in_sequence, joined, nothing


def prepare(model: nn.Module, inputs: Mapping[str, Tensor]) -> Prompt:
    """inputs: input_ids [1, tokens], pixel_values [images, 3, height, width] if there are any."""
    features = nothing(model)
    if "pixel_values" in inputs:
        pixels = inputs["pixel_values"].to(model.dtype)
        features = joined(model.get_image_features(pixels).pooler_output)
    return in_sequence(
        *embed(model, inputs["input_ids"][0], {model.config.image_token_id: features})
    )
