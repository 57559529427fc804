"""Tiny seeded checkpoints of five model families: real transformers classes, random weights, no download.

    from benchmarks.local_models import FAMILIES, FamilyShape, build_family

    folder = build_family(root / "qwen2.5-vl", "qwen2.5-vl")                     # 8 layers, made in about a second
    folder = build_family(root / "deep", "qwen2.5-vl", FamilyShape(text_layers=12))

Families: qwen2-vl, qwen2.5-vl, qwen3-vl, llava-next, llava-onevision. The LLaVA-1.5 of the demo is in
`benchmarks/local_model.py`. A folder is complete or absent, and made anew only if family, shape or recipe differ.
Tokenizer, processor and chat template are the family's real formats with a small vocabulary; a photograph becomes
50 to 120 visual tokens, by its size and aspect. Parameters are named as in the published checkpoints, which
transformers and vLLM both read.
"""

import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.checkpoint_folder import build_folder
from benchmarks.local_models import llava_next, llava_onevision, qwen2_5_vl, qwen2_vl, qwen3_vl
from benchmarks.local_models.family import Family, FamilyShape
from benchmarks.local_tokenizer import word_token_ids
from benchmarks.seeded_weights import clouds, fill_weights, normalise_visual_tokens

__all__ = ["FAMILIES", "Family", "FamilyShape", "build_family"]

# Raised whenever the same shape would give other files, so that older folders are made anew.
RECIPE = 1

FAMILIES: dict[str, Family] = {
    "qwen2-vl": qwen2_vl.FAMILY,
    "qwen2.5-vl": qwen2_5_vl.FAMILY,
    "qwen3-vl": qwen3_vl.FAMILY,
    "llava-next": llava_next.FAMILY,
    "llava-onevision": llava_onevision.FAMILY,
}
CLOUD_SIZE = 224


def build_family(path: Path | str, family: str, shape: FamilyShape | None = None) -> Path:
    """Makes that family's checkpoint at `path` unless it is there already. Without a shape: the tiny one."""
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown. Choose one of: {', '.join(FAMILIES)}.")
    shape = shape or FamilyShape()
    wanted = {"family": family, "recipe": RECIPE, **asdict(shape)}
    return build_folder(path, wanted, partial(_save, family=family, shape=shape))


def _save(folder: Path, family: str, shape: FamilyShape) -> None:
    started = time.perf_counter()
    made = FAMILIES[family]
    processor = made.make_processor(shape)
    model = made.model_class(made.make_config(shape, processor.tokenizer))
    fill_weights(model, shape.seed, word_token_ids(processor.tokenizer.get_vocab()))
    _normalise(model, processor, made, shape.seed)
    weights = model.to(getattr(torch, shape.dtype)).state_dict()
    save_file(
        {made.published_name(name): weight.contiguous() for name, weight in weights.items()},
        folder / "model.safetensors",
    )
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"[local model] {family}: {shape.text_layers} layers, {parameters / 1e6:.1f} M random weights, "
        f"{time.perf_counter() - started:.1f} s",
        file=sys.stderr,
        flush=True,
    )


def _normalise(model: Any, processor: Any, family: Family, seed: int) -> None:
    inputs = processor.image_processor(
        list(clouds(CLOUD_SIZE, seed)), do_rescale=False, do_normalize=False, return_tensors="pt"
    )
    normalise_visual_tokens(
        [model.get_submodule(name) for name in family.projections],
        lambda: model.get_image_features(**inputs),
    )
