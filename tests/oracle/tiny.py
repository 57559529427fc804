"""Tiny seeded LLaVA checkpoints and requests for checking the oracle itself."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

DEPTH = 6
VISUAL = 25  # per image: 20 x 20 pixels in patches of 4
IMAGE = 120  # the image token
IMAGE_SIZE = 20
PROMPT = [1, 11, 12, *[IMAGE] * VISUAL, 13, 14, 15, 16]
NUM_TEXT = 7
TWO_IMAGES = [1, 21, *[IMAGE] * VISUAL, 22, 23, *[IMAGE] * VISUAL, 24, 25, 26]
TEXT_ONLY = [1, 31, 32, 33, 34]

TEXT_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "llama-mha": (LlamaConfig, {"num_key_value_heads": 4}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 24}),
}


def build(directory: Path, family: str = "llama", seed: int = 0, **text_options: object) -> Path:
    """Saves a checkpoint whose every parameter, norms and biases included, is random."""
    config_class, options = TEXT_CONFIGS[family]
    shape = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=config_class(**{**shape, **options, **text_options}),
        image_token_index=IMAGE,
        image_seq_length=VISUAL,
    )
    model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:  # unit variance in, about unit variance out: attention is far from uniform
                parameter.copy_(noise * (1.5 / parameter[0].numel() ** 0.5))
    model.save_pretrained(directory)
    return directory


def images(count: int, seed: int = 0) -> Tensor:
    """[count, 3, IMAGE_SIZE, IMAGE_SIZE], seeded noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def request(prompt: list[int], num_images: int = 0) -> dict[str, Tensor]:
    """What a processor would make of that prompt and as many noise images."""
    inputs = {"input_ids": torch.tensor([prompt], dtype=torch.long)}
    if num_images:
        inputs["pixel_values"] = images(num_images)
    return inputs
