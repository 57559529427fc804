"""Image embeddings instead of images: routed as the images they come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks.local_models import build_family
from tests.engine.conftest import engine_args
from tests.engine.family_requests import FamilyAsk, processor
from tests.engine.host import EngineHost
from tests.engine.oracle_answers import OracleAnswers
from tests.engine.probes import generate
from tests.engine.requests import ONE_IMAGE, TEXT_ONLY, TWO_IMAGES, Ask
from vllm_reroute.schedule import RerouteOptions

OPTIONS: dict[str, Any] = {"layers": [2, 4, 6], "keep": [0.5, 0.25, 0.4]}
SCHEDULE = RerouteOptions.from_mapping(OPTIONS).resolve(8)


@dataclass(frozen=True)
class EmbeddedAsk:
    """A request whose images the client has run through the vision tower. data: as vLLM takes it."""

    ask: Ask | FamilyAsk
    data: Any

    def prompt(self) -> dict[str, Any]:
        return {**self.ask.prompt(), "multi_modal_data": {"image": self.data}}

    def sampling_params(self) -> Any:
        return self.ask.sampling_params()


@torch.inference_mode()
def features(folder: Path, ask: Ask | FamilyAsk) -> tuple[tuple[torch.Tensor, ...], Any]:
    """Embeddings [visual, hidden] of each image, and the processor's output for the request."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = ask.inputs(processor(folder))
    visual = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    return tuple(model.model.get_image_features(**visual).pooler_output), inputs


def check(
    host: EngineHost, folder: Path, oracles: OracleAnswers, name: str, asks: list[Any]
) -> None:
    host.engine(
        **engine_args(
            folder,
            OPTIONS,
            enable_mm_embeds=True,
            max_model_len=1024,
            max_num_batched_tokens=1100,
            limit_mm_per_prompt={"image": 2},
        )
    )
    for ask, answer in zip(asks, host.call(generate, asks), strict=True):
        plain = ask.ask if isinstance(ask, EmbeddedAsk) else ask
        oracles.check(name, SCHEDULE, plain, answer)


def test_llava_takes_image_embeddings(
    host: EngineHost, models: Any, oracles: OracleAnswers
) -> None:
    """Beside an image that is still an image, and text."""
    folder = models["grouped"]
    embedded = EmbeddedAsk(TWO_IMAGES, list(features(folder, TWO_IMAGES)[0]))
    check(host, folder, oracles, "grouped", [embedded, TEXT_ONLY, ONE_IMAGE])


def test_qwen_takes_image_embeddings(
    v1: EngineHost, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With the grid they come from, which the positions need."""
    folder = build_family(tmp_path_factory.mktemp("embeddings") / "qwen2.5-vl", "qwen2.5-vl")
    ask = FamilyAsk(folder, (("image", 0), ("text", "or"), ("image", 1), ("text", "which?")))
    images, inputs = features(folder, ask)
    data = {"image_embeds": torch.cat(images), "image_grid_thw": inputs["image_grid_thw"]}
    check(v1, folder, OracleAnswers({"qwen": folder}), "qwen", [EmbeddedAsk(ask, data)])
