"""Requests make the same decisions whatever happens around them, and leave nothing behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.engine.conftest import engine_args
from tests.engine.host import EngineHost
from tests.engine.oracle_answers import OracleAnswers
from tests.engine.probes import free_blocks, generate, scheduler_of, stepwise
from tests.engine.requests import (
    LONG_TEXT,
    MIXED,
    ONE_IMAGE,
    OTHER_IMAGE,
    TEXT_ONLY,
    TWO_IMAGES,
    Ask,
)
from vllm_reroute.schedule import RerouteOptions, RoutingSchedule
from vllm_reroute.schedule.footprint import RequestFootprint

OPTIONS: dict[str, Any] = {"layers": [1, 3, 6], "keep": [0.5, 0.1, 0.8]}
SCHEDULE: RoutingSchedule = RerouteOptions.from_mapping(OPTIONS).resolve(8)
MANY = (
    *MIXED,
    *(
        replace(ask, text=f"SYSTEM: {'be kind ' * (3 + i)}{ask.text}")
        for i, ask in enumerate(MIXED)
    ),
)


def check_against_oracle(
    oracles: OracleAnswers, asks: tuple[Ask, ...], seen: dict[str, Any]
) -> None:
    answers = zip(asks, seen["tokens"], seen["prompts"], seen["decisions"], strict=True)
    for ask, tokens, prompt, kept in answers:
        expected = oracles.result("grouped", SCHEDULE, ask, prompt)
        assert tokens == expected.token_ids
        if ask.images:
            assert kept == expected.selected


def test_prefills_join_running_decodes(
    host: EngineHost, models: Any, oracles: OracleAnswers
) -> None:
    """Image prefills, chunked text prefills and decodes share steps."""
    host.engine(**engine_args(models["grouped"], OPTIONS, max_num_batched_tokens=200))
    before = host.call(free_blocks)
    seen = host.call(stepwise, MANY, every=2)
    check_against_oracle(oracles, MANY, seen)
    assert seen["free"] == before


def test_preempted_requests_repeat_their_decisions(
    v1: EngineHost, models: Any, oracles: OracleAnswers
) -> None:
    """A pool too small for all: requests are preempted, resumed, and answer the same."""
    long = tuple(replace(ask, max_tokens=96) for ask in MANY)
    # K and V of 32 tokens, 2 heads of 32 values, fp32: a block of one layer.
    block_bytes = 32 * 2 * 2 * 32 * 4
    v1.engine(
        **engine_args(
            models["grouped"], OPTIONS, kv_cache_memory_bytes=260 * block_bytes, max_model_len=480
        )
    )
    before = v1.call(free_blocks)
    seen = v1.call(stepwise, long, every=1)
    assert seen["preempted"] >= 2
    check_against_oracle(oracles, long, seen)
    assert seen["free"] == before


def shared_prefix_hits(llm: Any) -> tuple[list[list[int]], int]:
    """Two long texts with a common start, one after the other: tokens, and tokens read from cache."""
    first, second = (
        LONG_TEXT,
        replace(LONG_TEXT, text=LONG_TEXT.text + " Now again, please: ASSISTANT:"),
    )
    tokens, cached = [], 0
    for ask in (first, second):
        output = llm.generate([ask.prompt()], ask.sampling_params(), use_tqdm=False)[0]
        tokens.append(list(output.outputs[0].token_ids))
        cached = output.num_cached_tokens
    return tokens, cached


def test_text_prefix_caching_works_and_changes_nothing(v1: EngineHost, models: Any) -> None:
    v1.engine(**engine_args(models["grouped"], OPTIONS, enable_prefix_caching=True))
    tokens, cached = v1.call(shared_prefix_hits)
    assert cached > 100 and cached % 32 == 0
    v1.engine(**engine_args(models["grouped"], OPTIONS, enable_prefix_caching=False))
    assert v1.call(shared_prefix_hits) == (tokens, 0)


def test_image_after_cached_text_prefix_is_exact(
    v1: EngineHost, models: Any, oracles: OracleAnswers
) -> None:
    """An image request whose text prefix and image are cached decides as if nothing were."""
    prefix = "SYSTEM: " + "First count what lies above, below and around each object. " * 6
    asks = [replace(ask, text=prefix + ask.text) for ask in (ONE_IMAGE, ONE_IMAGE, OTHER_IMAGE)]
    v1.engine(**engine_args(models["grouped"], OPTIONS, enable_prefix_caching=True))
    for ask in asks:
        (answer,) = v1.call(generate, [ask])
        oracles.check("grouped", SCHEDULE, ask, answer)


def live_blocks(llm: Any, ask: Ask, steps: int) -> tuple[int, int, int]:
    """Blocks a request holds after some steps, the tokens it has K/V for, and free blocks after."""
    engine = llm.llm_engine
    engine.add_request("live", llm._preprocess_cmpl([ask.prompt()])[0], ask.sampling_params())
    for _ in range(steps):
        engine.step()
    (request,) = scheduler_of(llm).requests.values()
    managers = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
    held = sum(len(m.req_to_blocks[request.request_id]) for m in managers)
    computed = request.num_computed_tokens
    engine.abort_request([request.request_id], internal=True)
    engine.step()
    return held, computed, free_blocks(llm)


def test_live_request_holds_no_blocks_for_deferred_tokens(v1: EngineHost, models: Any) -> None:
    """Counted blocks are those of text + kept tokens; an abort gives every one back."""
    v1.engine(**engine_args(models["grouped"], OPTIONS))
    before = v1.call(free_blocks)
    for ask, num_images in ((ONE_IMAGE, 1), (TWO_IMAGES, 2), (TEXT_ONLY, 0)):
        long = replace(ask, max_tokens=60)
        held, computed, after = v1.call(live_blocks, long, 40)
        footprint = RequestFootprint(
            schedule=SCHEDULE,
            num_visual=64 * num_images,
            num_text=computed - 64 * num_images,
            bytes_per_token=1,
            block_size=32,
        )
        assert held == footprint.routed_blocks
        assert after == before


def samples(llm: Any) -> list[list[int]]:
    ask = replace(ONE_IMAGE, options={"n": 3, "temperature": 1.0, "seed": 7})
    (output,) = llm.generate([ask.prompt()], ask.sampling_params(), use_tqdm=False)
    return [list(completion.token_ids) for completion in output.outputs]


def test_several_samples_of_one_image_request(v1: EngineHost, models: Any) -> None:
    v1.engine(**engine_args(models["grouped"], OPTIONS))
    before = v1.call(free_blocks)
    first, again = v1.call(samples), v1.call(samples)
    assert first == again
    assert len({tuple(tokens) for tokens in first}) == 3
    assert v1.call(free_blocks) == before
