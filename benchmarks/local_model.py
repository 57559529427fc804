"""LLaVA-1.5-shaped checkpoints made from a seed: real transformers classes, random weights, no download.

    python -m benchmarks.local_model --shape demo --out .local/models/demo-llava

Prints the folder.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from benchmarks.checkpoint_folder import build_folder
from benchmarks.local_tokenizer import (
    VOCABULARY_SIZE,
    image_token_id,
    make_processor,
    word_token_ids,
)
from benchmarks.seeded_weights import clouds, fill_weights, normalise_visual_tokens

MODELS = Path(__file__).resolve().parent.parent / ".local" / "models"
# Raised whenever the same shape would give other files, so that older folders are made anew.
RECIPE = 2

BACKBONES: dict[str, tuple[Callable[..., PreTrainedConfig], dict]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {"use_sliding_window": False}),
}
PUBLISHED_NAMES = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
# What vLLM's attention on CPU supports.
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


@dataclass(frozen=True, kw_only=True)
class LlavaShape:
    """Everything a checkpoint depends on. Equal shapes give equal files."""

    backbone: str = "llama"
    text_layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vision_layers: int
    vision_hidden_size: int
    vision_heads: int
    image_size: int
    patch_size: int = 14
    max_positions: int = 4096
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(
                f"backbone={self.backbone!r} is unknown. Choose one of: {', '.join(BACKBONES)}."
            )
        if self.hidden_size % self.heads or self.hidden_size // self.heads not in HEAD_SIZES:
            raise ValueError(
                f"hidden_size={self.hidden_size} with heads={self.heads} gives no head size that vLLM supports on CPU. "
                f"hidden_size / heads must be one of: {', '.join(map(str, HEAD_SIZES))}."
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}.")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size} must divide image_size={self.image_size}."
            )
        if self.vision_layers < 2:
            raise ValueError(
                f"vision_layers={self.vision_layers} is too few: the layer before the last is read."
            )

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one image, the class token dropped."""
        return (self.image_size // self.patch_size) ** 2


TINY = LlavaShape(
    text_layers=8,
    hidden_size=64,
    heads=2,
    kv_heads=2,
    intermediate_size=128,
    vision_layers=3,
    vision_hidden_size=64,
    vision_heads=2,
    image_size=56,
    max_positions=1024,
)

SHAPES: dict[str, LlavaShape] = {
    # LLaVA-1.5's depth and grid, so that published decision layers and counts apply as published.
    "demo": LlavaShape(
        text_layers=32,
        hidden_size=256,
        heads=8,
        kv_heads=8,
        intermediate_size=688,
        vision_layers=4,
        vision_hidden_size=128,
        vision_heads=4,
        image_size=336,
    ),
    "tiny": TINY,
    "tiny-grouped": LlavaShape(**asdict(TINY) | {"hidden_size": 128, "heads": 4, "kv_heads": 2}),
    "tiny-64-visual": LlavaShape(**asdict(TINY) | {"image_size": 112}),
}
DEMO = SHAPES["demo"]


def build_local_model(path: Path | str, shape: LlavaShape) -> Path:
    """Makes the checkpoint at `path` unless it is there already."""
    return build_folder(path, {"recipe": RECIPE, **asdict(shape)}, partial(_save, shape=shape))


def _save(folder: Path, shape: LlavaShape) -> None:
    started = time.perf_counter()
    model = LlavaForConditionalGeneration(make_config(shape))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _say(
        f"making a LLaVA of {shape.text_layers} layers and {parameters / 1e6:.1f} M random weights"
    )
    fill_weights(model, shape.seed, word_token_ids())
    normalise_visual_tokens(
        [model.model.multi_modal_projector.linear_2],
        lambda: model.get_image_features(pixel_values=clouds(shape.image_size, shape.seed)),
    )
    weights = model.to(getattr(torch, shape.dtype)).state_dict()
    save_file(
        {_published_name(name): weight for name, weight in weights.items()},
        folder / "model.safetensors",
    )
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    make_processor(shape.image_size, shape.patch_size).save_pretrained(folder)
    _say(f"made in {time.perf_counter() - started:.1f} s")


def _published_name(name: str) -> str:
    """Where LLaVA-1.5 checkpoints keep that parameter. transformers reads these names and vLLM reads only these."""
    for ours, theirs in PUBLISHED_NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"LLaVA-1.5 has no parameter {name!r}.")


def make_config(shape: LlavaShape) -> LlavaConfig:
    """LLaVA-1.5's configuration in that shape."""
    text_class, text_options = BACKBONES[shape.backbone]
    text = text_class(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
        **text_options,
    )
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden_size,
        intermediate_size=4 * shape.vision_hidden_size,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        projection_dim=shape.vision_hidden_size,
    )
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id(),
        image_seq_length=shape.visual_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=3,  # type: ignore[call-arg]  # taken, but not declared
        dtype=shape.dtype,
    )


def _say(line: str) -> None:
    print(f"[local model] {line}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument(
        "--out", type=Path, help="folder to make; default: .local/models/SHAPE-llava"
    )
    args = parser.parse_args()
    print(build_local_model(args.out or MODELS / f"{args.shape}-llava", SHAPES[args.shape]))


if __name__ == "__main__":
    main()
