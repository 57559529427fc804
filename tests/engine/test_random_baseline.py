"""The random baseline keeps what chance says, by prompt and layer, and nothing else."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from tests.engine.conftest import engine_args
from tests.engine.host import EngineHost
from tests.engine.probes import generate, generate_one_by_one
from tests.engine.requests import MIXED

OPTIONS: dict[str, Any] = {"layers": [2, 5], "keep": [0.5, 0.25], "scorer": "random"}


def chosen(prompt: list[int], image_token: int, layer: int, count: int) -> list[int]:
    """Indices into the visual tokens with the highest of one uniform number per prompt token."""
    seed = zlib.crc32(np.array(prompt, dtype=np.int64).tobytes())
    numbers = np.random.default_rng([seed, layer]).random(len(prompt)).astype(np.float32)
    visual = numbers[np.array(prompt) == image_token]
    return sorted(np.argsort(-visual, kind="stable")[:count].tolist())


def image_token(llm: Any) -> int:
    return llm.llm_engine.model_config.hf_config.image_token_index


def test_kept_tokens_are_those_of_chance(v1: EngineHost, models: Any) -> None:
    v1.engine(**engine_args(models["grouped"], OPTIONS))
    together, alone = v1.call(generate, MIXED), v1.call(generate_one_by_one, MIXED)
    token = v1.call(image_token)
    for ask, one, other in zip(MIXED, together, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.selected == other.selected
        if ask.images:
            visual = 64 * len(ask.images)
            assert one.selected == [
                chosen(one.prompt_token_ids, token, layer, int(visual * ratio))
                for layer, ratio in zip(OPTIONS["layers"], OPTIONS["keep"], strict=True)
            ]
