"""Random weights under which a LLaVA behaves like a model: it looks at the image and prefers some tokens clearly.

Usual initialisation makes every attention map flat and every hidden state alike, so that rankings of visual tokens
and greedy choices hang on rounding. Here the scales are chosen per role instead.
"""

import math
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Standard deviation of an attention logit whose inputs are normalised is the square of this.
ATTENTION_SHARPNESS = 2.0
# What all layers of a part add to its residual stream, as a multiple of what enters. Little in the vision tower:
# attention mixes patches, and mixed patches are alike.
RESIDUAL_VARIANCE = {"language_model": 8.0, "vision_tower": 0.5}
# Standard deviation of the logits of ordinary words.
LOGIT_SCALE = 2.0


def fill_weights(model: nn.Module, seed: int, words: Iterable[int]) -> None:
    """Overwrites every parameter. A parameter depends on the seed, its name and its shape alone.

    words: token ids the model should answer with; the logits of all other tokens stay near zero.
    """
    depths = {
        "language_model": model.config.text_config.num_hidden_layers,
        "vision_tower": model.config.vision_config.num_hidden_layers,
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + (seed << 32))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            part = next((part for part in depths if part in name), None)
            per_block = math.sqrt(RESIDUAL_VARIANCE[part] / (2 * depths[part])) if part else 1.0
            parameter.copy_(scale_for_role(name, noise, per_block))
        normalise_visual_tokens(model, seed)
        spoken = torch.zeros(model.lm_head.weight.shape[0], 1)
        spoken[list(words)] = 1.0
        model.lm_head.weight.mul_(spoken)


def scale_for_role(name: str, noise: Tensor, per_block: float) -> Tensor:
    """Unit-variance noise of a parameter's shape, scaled by what the parameter does in its network.

    per_block: standard deviation of what one attention or feed-forward block adds to the residual stream.
    """
    if "norm" in name or "layrnorm" in name:
        return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
    if noise.dim() == 1:
        return 0.1 * noise
    if "embed_tokens" in name or "position_embedding" in name:
        return noise
    per_input = noise / math.sqrt(noise[0].numel())
    if "patch_embedding" in name:
        # Filters without a mean see structure rather than brightness, which photographs have in common.
        return 3 * (per_input - per_input.mean(dim=(1, 2, 3), keepdim=True))
    if "q_proj" in name or "k_proj" in name:
        return ATTENTION_SHARPNESS * per_input
    if "o_proj" in name or "out_proj" in name or "down_proj" in name or "fc2" in name:
        return per_block * per_input
    if "lm_head" in name:
        return LOGIT_SCALE * per_input
    return per_input


def normalise_visual_tokens(model: nn.Module, seed: int) -> None:
    """Gives visual tokens of cloud-like pictures mean 0 and variance 1, as text embeddings have.

    Otherwise a common direction outweighs what tells visual tokens apart, and hundreds of them drown the prompt.
    """
    size = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(seed)
    clouds = torch.zeros(8, 3, size, size)
    for grid in (2, 4, 8, 16, 32):
        noise = torch.randn(8, 3, grid, grid, generator=generator)
        clouds += (
            nn.functional.interpolate(noise, size=(size, size), mode="bilinear") * (2 / grid) ** 0.5
        )
    strategy = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    features = model.get_image_features(pixel_values=clouds, **strategy).pooler_output
    features = torch.cat(list(features)).flatten(0, -2)
    projection = model.model.multi_modal_projector.linear_2
    spread = (features - features.mean(0)).std()
    projection.bias.sub_(features.mean(0)).div_(spread)
    projection.weight.div_(spread)
