"""Random weights under which a vision-language model behaves like one: it looks at the image and prefers some tokens.

Usual initialisation makes every attention map flat and every hidden state alike, so that rankings of visual tokens
and greedy choices hang on rounding. Here the scales are chosen per role instead.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Standard deviation of an attention logit whose inputs are normalised is the square of this.
ATTENTION_SHARPNESS = 2.0
# What all layers of a part add to its residual stream, as a multiple of what enters. Little in the vision tower:
# attention mixes patches, and mixed patches are alike.
TEXT_VARIANCE = 8.0
VISION_VARIANCE = 0.5
BRIGHTNESS_UNSEEN = 0.7
# Standard deviation of the logits of ordinary words.
LOGIT_SCALE = 2.0

ENDS_OF_A_BLOCK = ("o_proj", "out_proj", "attn.proj", "down_proj", "fc2")
VISION_TOWERS = ("vision_tower", "visual")


def fill_weights(model: PreTrainedModel, seed: int, words: Iterable[int]) -> None:
    """Overwrites every parameter. A parameter depends on the seed, its name and its shape alone.

    words: token ids the model should answer with; the logits of all other tokens stay near zero.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + (seed << 32))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(scale_for_role(name, noise, _added_per_block(model, name)))
        head = model.get_output_embeddings().weight
        spoken = torch.zeros(head.shape[0], 1)
        spoken[list(words)] = 1.0
        head.mul_(spoken)


def _added_per_block(model: PreTrainedModel, name: str) -> float:
    """Standard deviation of what one attention or feed-forward block of that part adds to its residual stream."""
    if "language_model" in name:
        return math.sqrt(TEXT_VARIANCE / (2 * model.config.text_config.num_hidden_layers))
    if any(tower in name for tower in VISION_TOWERS):
        vision = model.config.vision_config
        depth = vision.depth if hasattr(vision, "depth") else vision.num_hidden_layers
        return math.sqrt(VISION_VARIANCE / (2 * depth))
    return 1.0


def scale_for_role(name: str, noise: Tensor, per_block: float) -> Tensor:
    """Unit-variance noise of a parameter's shape, scaled by what the parameter does in its network.

    per_block: standard deviation of what one attention or feed-forward block adds to the residual stream.
    """
    if "q_norm" in name or "k_norm" in name:
        # The norm hides the scale of the projection before it.
        return ATTENTION_SHARPNESS * (1 + 0.1 * noise)
    if "norm" in name or "layrnorm" in name or "ln_q" in name:
        return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
    if "image_newline" in name:
        return noise
    if noise.dim() == 1:
        return 0.1 * noise
    if "embed_tokens" in name or "position_embedding" in name or "pos_embed" in name:
        return noise
    per_input = noise / math.sqrt(noise[0].numel())
    if "patch_embed" in name:
        # Filters without a mean see structure rather than brightness, which photographs have in common.
        inputs = tuple(range(1, noise.dim()))
        brightness = per_input.mean(dim=inputs, keepdim=True)
        if "patch_embedding" not in name:
            # Qwen's patches meet a norm with nothing added, and plain ones must not be rounding errors blown up.
            brightness = BRIGHTNESS_UNSEEN * brightness
        return 3 * (per_input - brightness)
    if "q_proj" in name or "k_proj" in name:
        return ATTENTION_SHARPNESS * per_input
    if "attn.qkv" in name:
        query, key, value = per_input.chunk(3)
        return torch.cat([ATTENTION_SHARPNESS * query, ATTENTION_SHARPNESS * key, value])
    if any(end in name for end in ENDS_OF_A_BLOCK):
        return per_block * per_input
    if "lm_head" in name:
        return LOGIT_SCALE * per_input
    return per_input


def clouds(size: int, seed: int) -> Tensor:
    """Eight pictures with structure at every scale, [8, 3, size, size], about mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.zeros(8, 3, size, size)
    for grid in (2, 4, 8, 16, 32):
        noise = torch.randn(8, 3, grid, grid, generator=generator)
        pictures += (
            nn.functional.interpolate(noise, size=(size, size), mode="bilinear") * (2 / grid) ** 0.5
        )
    return pictures


@torch.no_grad()
def normalise_visual_tokens(projections: Sequence[nn.Linear], look: Callable[[], object]) -> None:
    """Gives what leaves each projection mean 0 and variance 1, as text embeddings have.

    Otherwise a common direction outweighs what tells visual tokens apart, and hundreds of them drown the prompt.
    look: shows the model pictures, so that every projection runs.
    """
    seen: list[list[Tensor]] = [[] for _ in projections]
    handles = [
        projection.register_forward_hook(lambda _, __, output, into=into: into.append(output))
        for projection, into in zip(projections, seen, strict=True)
    ]
    try:
        look()
    finally:
        for handle in handles:
            handle.remove()
    for projection, outputs in zip(projections, seen, strict=True):
        features = torch.cat([output.flatten(0, -2) for output in outputs])
        spread = (features - features.mean(0)).std()
        projection.bias.sub_(features.mean(0)).div_(spread)
        projection.weight.div_(spread)
