"""Writes a trained model as a LLaVA-1.5 checkpoint that transformers and vLLM read."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlavaForConditionalGeneration

from benchmarks.grounding.vocabulary import make_processor
from benchmarks.local_model import PUBLISHED_NAMES

DTYPE = torch.bfloat16


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Makes `folder` anew with weights, configuration, tokenizer and image processor."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights = {
        _published_name(name): weight.to(DTYPE).contiguous()
        for name, weight in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    model.config.dtype = DTYPE
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    vision = model.config.vision_config
    assert isinstance(vision, CLIPVisionConfig) and isinstance(vision.patch_size, int)
    make_processor(vision.patch_size).save_pretrained(folder)


def _published_name(name: str) -> str:
    """Where LLaVA-1.5 checkpoints keep that parameter."""
    ours = next(ours for ours in PUBLISHED_NAMES if name.startswith(ours))
    return PUBLISHED_NAMES[ours] + name.removeprefix(ours)
