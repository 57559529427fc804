"""A routed server as a client sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from benchmarks.grounding.conversations import conversations
from benchmarks.local_model import TINY, build_local_model
from benchmarks.local_server import LocalServer
from benchmarks.quality.asking import Endpoint
from benchmarks.quality.conversations.talking import hold_all, talks_of, turns_of
from benchmarks.quality.outcomes import Outcome
from tests.server.chat import (
    MAX_TOKENS,
    MODEL_NAME,
    ask,
    check_answers,
    check_concurrent_answers,
    kept,
    messages,
)
from tests.server.refusals import CHAT, chat, new_picture, post, responses
from tests.server.scraping import of_routing, scrape
from vllm_reroute.explain.trace import stages_of, trace_of
from vllm_reroute.schedule import RerouteOptions
from vllm_reroute.schedule.footprint import RequestFootprint

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
        ({"text": "And these?", "photos": (0,) * 12}, "maximum context length"),
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


def test_a_request_chooses_its_own_budget(client: openai.OpenAI, model: Path) -> None:
    """In vLLM's own field for more arguments; what the server does not have is refused."""
    asks = [("What is shown here?", (0,))]
    own = {"reroute_tier": 64, "reroute_explain": True}
    check_answers(client, model, TINY.text_layers, asks, tier=64, vllm_xargs=own)
    with pytest.raises(openai.BadRequestError, match="reroute_tier 63 is unknown"):
        ask(client, *asks[0], vllm_xargs={"reroute_tier": 63})


def test_a_request_is_told_what_was_decided(server: LocalServer, client: openai.OpenAI) -> None:
    """Every choice says it, also where a front end ends an answer at a stop string."""
    schedule = RerouteOptions(schedule="pdrop", tier=128).resolve(TINY.text_layers)
    asked = ("What are these?", (1, 3))
    plain = ask(client, *asked)
    assert plain.choices[0].routed_experts is None
    # Two different answers.
    options = {"vllm_xargs": {"reroute_explain": "scores"}, "n": 2, "temperature": 1}
    both = ask(client, *asked, **options, stop=[])
    assert len(both.choices) == 2
    first, other = kept(both, schedule)
    assert [len(of_stage) for of_stage in first] == schedule.kept_per_stage(2 * VISUAL)[1:]
    stop = plain.choices[0].message.content[-1]
    stopped = ask(client, *asked, vllm_xargs={"reroute_explain": True}, stop=[stop])
    assert stopped.choices[0].finish_reason == "stop"
    assert kept(stopped, schedule) == [first] == [other]
    words = ask(client, "Only words.", vllm_xargs={"reroute_explain": True})
    assert words.choices[0].routed_experts is None
    body = chat(new_picture(), stream=True, vllm_xargs={"reroute_explain": True})
    status, said = post(f"{server.url}{CHAT}", body)
    assert status == 400 and "Leave stream out" in said
    body = responses(new_picture(), vllm_xargs={"reroute_explain": True})
    status, said = post(f"{server.url}/v1/responses", body)
    assert status == 400 and "ask /v1/chat/completions" in said


def test_metrics_count_what_was_asked(server: LocalServer, client: openai.OpenAI) -> None:
    before = scrape(server)
    asked = [
        (128, "What is on this one?", (2,), {}),
        (128, "And what is that?", (2,), {}),
        (128, "Only words.", (), {}),
        (64, "Compare them.", (3, 0), {"vllm_xargs": {"reroute_tier": 64}}),
    ]
    footprints, back = [], np.zeros(5, dtype=int)
    for tier, text, photos, options in asked:
        options.setdefault("vllm_xargs", {})["reroute_explain"] = True
        answer = ask(client, text, photos, **options)
        footprints.append(_footprint(server, tier, len(photos), answer))
        back += _brought_back(tier, answer)
    assert back[2:].all()
    with_images = [one for one in footprints if one.num_visual]
    visual = sum(one.num_visual for one in with_images)
    kept = [sum(of_stage) for of_stage in zip(*(one.kept for one in with_images), strict=True)]
    held = sum(one.routed_bytes for one in with_images)
    counted = scrape(server)
    counted.subtract(before)
    reached = [
        counted.pop(("vllm:reroute_prefix_cache_tokens_total", reach), 0)
        for reach in ("all_stages", "first_stage")
    ]
    assert reached[1] and sum(reached) == counted["vllm:prefix_cache_hits_total",]
    assert of_routing(counted) == {
        ("vllm:reroute_requests_total", "server", "pdrop"): 2,
        ("vllm:reroute_requests_total", "request", "pdrop"): 1,
        **{
            (f"vllm:reroute_visual_tokens_{what}_total", str(stage)): number
            for stage, k in enumerate(kept)
            for what, number in (("seen", visual), ("kept", k), ("deferred", visual - k))
            if number
        },
        **{
            ("vllm:reroute_visual_tokens_brought_back_total", str(stage)): number
            for stage, number in enumerate(back)
            if number
        },
        ("vllm:reroute_kv_bytes_allocated_total",): held,
        ("vllm:reroute_kv_bytes_saved_total",): sum(one.dense_bytes for one in with_images) - held,
    }


def _brought_back(tier: int, answer: Any) -> list[int]:
    """Visual tokens that each stage got back, by what the answer says of every stage."""
    told = answer.choices[0].routed_experts
    if told is None:
        return [0] * 5
    schedule = RerouteOptions(schedule="pdrop", tier=tier).resolve(TINY.text_layers)
    trace = trace_of(told, schedule, len(answer.prompt_token_ids))
    return [stage.num_brought_back for stage in stages_of(trace)]


def _footprint(server: LocalServer, tier: int, num_images: int, answer: Any) -> RequestFootprint:
    """K/V that a request held when it was answered; the last token has none."""
    num_visual = num_images * VISUAL
    return RequestFootprint(
        schedule=RerouteOptions(schedule="pdrop", tier=tier).resolve(TINY.text_layers),
        num_visual=num_visual,
        num_text=len(answer.prompt_token_ids) - num_visual + MAX_TOKENS - 1,
        image_sizes=(VISUAL,) * num_images,
        bytes_per_token=2 * TINY.kv_heads * (TINY.hidden_size // TINY.heads) * 4,
        block_size=int(server.label("vllm:cache_config_info", "block_size")),
    )


def test_conversations_are_held_to_their_ends(server: LocalServer) -> None:
    """As their table is made; the fourth one has a second picture."""
    talks = talks_of(conversations("test", 4))
    outcomes: list[Outcome] = []
    hold_all(Endpoint(url=f"{server.url}/v1", model=MODEL_NAME), talks, 4, outcomes.append)
    assert [each.error for each in outcomes] == [None] * len(turns_of(talks))
    assert sorted(each.index for each in outcomes) == list(range(len(outcomes)))


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


def test_bad_option_stops_the_server_at_start(model: Path) -> None:
    flags = ["--reroute-schedule", "pdrop", "--pipeline-parallel-size", "2"]
    server = LocalServer("test-refused", model, flags, start_limit_s=120)
    with pytest.raises(RuntimeError, match="ended with code"), server:
        pass
    log = server.log.read_text(encoding="utf-8")
    assert "--pipeline-parallel-size 2 cannot be" in log
