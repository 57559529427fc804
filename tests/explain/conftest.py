"""Checkpoints whose processors the tests of this folder use."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.grounding.evaluate import MODEL
from benchmarks.local_models import build_family

SEEDED = ("llava-next", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> checkpoint."""
    root = tmp_path_factory.mktemp("families")
    return {"llava": MODEL, **{family: build_family(root / family, family) for family in SEEDED}}
