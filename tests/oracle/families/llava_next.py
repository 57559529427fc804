"""LLaVA-NeXT: an overview and the unpadded tiles of each image, and a newline after each row of tiles.

Newlines stand at image placeholders and are visual tokens like any other.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from .prompt import Prompt, embed, in_sequence, joined, nothing


def prepare(model: nn.Module, inputs: Mapping[str, Tensor]) -> Prompt:
    """inputs: input_ids [1, tokens]; pixel_values [images, tiles, 3, height, width], image_sizes [images, 2]."""
    features = nothing(model)
    if "pixel_values" in inputs:
        pixels = inputs["pixel_values"].to(model.dtype)
        features = joined(model.get_image_features(pixels, inputs["image_sizes"]).pooler_output)
    return in_sequence(
        *embed(model, inputs["input_ids"][0], {model.config.image_token_id: features})
    )
