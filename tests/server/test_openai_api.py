"""A routed server as a client sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from benchmarks.local_model import TINY, build_local_model
from benchmarks.local_server import LocalServer
from tests.server.chat import (
    MAX_TOKENS,
    MODEL_NAME,
    ask,
    check_answers,
    check_concurrent_answers,
    messages,
)
from vllm_reroute.schedule import RerouteOptions

STEP_TOKENS = 600
MODEL_LEN = 768
VISUAL = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_local_model(
        tmp_path_factory.mktemp("served") / "tiny-llava", replace(TINY, image_size=112)
    )


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LocalServer]:
    flags = {
        "--reroute-schedule": "pdrop",
        "--reroute-tier": "128",
        "--dtype": "float32",
        "--max-model-len": str(MODEL_LEN),
        "--max-num-batched-tokens": str(STEP_TOKENS),
        "--kv-cache-memory-bytes": str(64 * 2**20),
        "--limit-mm-per-prompt": '{"image": 12}',
        "--served-model-name": MODEL_NAME,
    }
    words = [word for pair in flags.items() for word in pair]
    with LocalServer(
        "test-routed", model, [*words, "--enforce-eager"], start_limit_s=300
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LocalServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def test_concurrent_answers_equal_the_oracle(client: openai.OpenAI, model: Path) -> None:
    """Images, two images and text at once; every answer is the one the schedule defines."""
    check_concurrent_answers(client, model, TINY.text_layers)


def test_prompt_longer_than_a_step_equals_the_oracle(client: openai.OpenAI, model: Path) -> None:
    """Ten pictures, 640 visual tokens: two steps at the least."""
    answer = check_answers(client, model, TINY.text_layers, [("And these?", (0, 1) * 5)])[0]
    assert len(answer.prompt_token_ids) > STEP_TOKENS


@pytest.mark.parametrize(
    ("case", "cure"),
    [
        ({"text": "What is this?", "image": b"these bytes are no image"}, "image"),
        ({"text": "And these?", "photos": (0,) * 12}, "--max-model-len"),
        ({"text": "Score the prompt.", "photos": (0,), "prompt_logprobs": 1}, "prompt_logprobs"),
    ],
    ids=["broken-image", "longer-than-the-model", "prompt-logprobs"],
)
def test_bad_request_is_refused_and_serving_goes_on(
    client: openai.OpenAI, case: dict[str, Any], cure: str
) -> None:
    options = {k: v for k, v in case.items() if k == "prompt_logprobs"}
    with pytest.raises(openai.BadRequestError, match=cure):
        client.chat.completions.create(
            model=MODEL_NAME,
            messages=messages(case["text"], case.get("photos", ()), case.get("image")),
            max_tokens=MAX_TOKENS,
            extra_body=options,
        )
    assert ask(client, "Still there?", (1,)).choices[0].message.content


def test_startup_log_states_the_schedule(server: LocalServer, client: openai.OpenAI) -> None:
    schedule = RerouteOptions(schedule="pdrop", tier=128).resolve(TINY.text_layers)
    log = server.log.read_text(encoding="utf-8")
    rows = STEP_TOKENS + max(STEP_TOKENS, MODEL_LEN)
    for part in (
        "schedule          pdrop, action reroute",
        f"decision layers   {', '.join(map(str, schedule.layers))} of {TINY.text_layers}",
        f"{schedule.average(VISUAL):.1f} per layer on average, of {VISUAL}",
        "KV cache per image request",
        "image requests that fit the KV pool at once",
        f"deferred-token buffer: {rows * TINY.hidden_size * 4 / 2**20:.3f} MiB",
    ):
        assert part in log


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reroute-schedule", "nosuch"], "invalid choice: 'nosuch' (choose from "),
        (["--reroute-tier", "64"], "--reroute-tier 64 needs a schedule"),
        (
            ["--reroute-schedule", "pdrop", "--pipeline-parallel-size", "2"],
            "--pipeline-parallel-size 2 cannot be",
        ),
    ],
    ids=["unknown-schedule", "tier-alone", "pipeline-parallel"],
)
def test_bad_option_stops_the_server_at_start(model: Path, flags: list[str], message: str) -> None:
    server = LocalServer("test-refused", model, flags, start_limit_s=120)
    with pytest.raises(RuntimeError, match="ended with code"), server:
        pass
    assert message in server.log.read_text(encoding="utf-8")
