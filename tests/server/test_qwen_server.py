"""Qwen2.5-VL over HTTP: another chat template, three position components, images of several sizes."""

from __future__ import annotations

from pathlib import Path

import openai

from benchmarks.local_models import FamilyShape, build_family
from benchmarks.local_server import LocalServer
from tests.server.chat import MODEL_NAME, check_concurrent_answers


def test_concurrent_answers_equal_the_oracle(tmp_path: Path) -> None:
    model = build_family(tmp_path / "qwen2.5-vl", "qwen2.5-vl")
    words = "--reroute-schedule pdrop --reroute-tier 128 --dtype float32 --max-model-len 1024"
    words += f" --kv-cache-memory-bytes {64 * 2**20} --served-model-name {MODEL_NAME}"
    with LocalServer(
        "test-qwen", model, [*words.split(), "--enforce-eager"], start_limit_s=300
    ) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)
        check_concurrent_answers(client, model, FamilyShape().text_layers)
