"""The example package, installed as a user would: its schedule and its scorer are listed and served."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import openai
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from benchmarks.local_model import TINY, build_local_model
from benchmarks.local_server import LocalServer
from benchmarks.photos import PHOTOS
from tests.oracle import RoutedOracle
from tests.server.chat import MAX_TOKENS, MODEL_NAME, ask
from vllm_reroute.schedule.budget import solve_keep_ratios
from vllm_reroute.schedule.published import scale_decision_layers

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugins"
ORIGIN = "reroute-plugins-example 0.1.0"
DEPTH, BUDGET = TINY.text_layers, 300


class MagnitudeOracle(RoutedOracle):
    """Ranks by the length of each candidate's state."""

    def _score(
        self, layer: int, hidden: Tensor, positions: Tensor, text: list[int], candidates: list[int]
    ) -> Tensor:
        return hidden[candidates].float().norm(dim=-1)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package in it, from a copy: building leaves files behind."""
    root = tmp_path_factory.mktemp("plugins")
    source = shutil.copytree(EXAMPLE, root / "source")
    words = "install --quiet --no-index --no-deps --no-build-isolation --target"
    subprocess.run(
        [sys.executable, "-m", "pip", *words.split(), str(root / "site"), str(source)], check=True
    )
    return root / "site"


def test_listed_and_served(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an API server and an engine core, each of which has to find it for itself."""
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(installed), before))))
    listed = subprocess.run(
        [Path(sys.executable).with_name("vllm-reroute"), "schedules"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "taper     reroute   192  2,10,20" in listed
    assert f"taper is from {ORIGIN}" in listed and f"magnitude (from {ORIGIN})" in listed

    monkeypatch.syspath_prepend(installed)
    taper = importlib.import_module("reroute_plugins.taper").TAPER["reroute"]
    layers = scale_decision_layers(taper.layers, DEPTH)
    model = build_local_model(tmp_path / "tiny-llava", replace(TINY, image_size=112))
    words = "--reroute-schedule taper --reroute-scorer magnitude"
    words += f" --dtype float32 --max-model-len 512 --kv-cache-memory-bytes {32 * 2**20}"
    words += f" --served-model-name {MODEL_NAME} --enforce-eager"
    with LocalServer("test-plugins", model, words.split(), start_limit_s=300) as server:
        log = server.log.read_text(encoding="utf-8")
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)
        for number, budget in enumerate((192, BUDGET, BUDGET)):
            answer = ask(client, "What is shown?", (number,), vllm_xargs={"reroute_budget": budget})
            oracle = MagnitudeOracle(
                model, action="reroute", layers=layers,
                keep=solve_keep_ratios(taper, DEPTH, layers, budget),
            )  # fmt: skip
            image = Image.open(BytesIO(PHOTOS[number].jpeg)).convert("RGB")
            processor = AutoProcessor.from_pretrained(model)
            inputs = processor.image_processor([image], return_tensors="pt")
            inputs["input_ids"] = torch.tensor([answer.prompt_token_ids])
            assert answer.choices[0].token_ids == oracle.run(inputs, MAX_TOKENS).token_ids
    assert f"schedule          taper (from {ORIGIN}), action reroute" in log
    assert f"ranked by         magnitude (from {ORIGIN})" in log
