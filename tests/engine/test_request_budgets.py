"""Requests that choose how much they keep: each gets its own, whoever is beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.engine.conftest import engine_args
from tests.engine.host import EngineHost
from tests.engine.oracle_answers import OracleAnswers
from tests.engine.probes import free_blocks, generate, generate_one_by_one, stepwise
from tests.engine.requests import LONG_TEXT, ONE_IMAGE, OTHER_IMAGE, TEXT_ONLY, TWO_IMAGES, Ask
from tests.engine.runners import on_runners
from vllm_reroute.schedule import RerouteOptions, RoutingSchedule
from vllm_reroute.schedule.request_options import RequestOptions

DEPTH = 8
REROUTE: dict[str, Any] = {"schedule": "pdrop", "tier": 128}
REMOVE: dict[str, Any] = {"layers": [2, 5], "keep": [0.4, 0.2], "action": "remove"}
CHOICES: dict[str, tuple[dict[str, Any], ...]] = {
    "reroute": (
        {"reroute": {"tier": 64}},
        {},
        {"reroute_keep": [0.9, 0.1, 0.5, 0.05]},
        {"reroute_schedule": "none"},
        {"reroute_budget": 300},
    ),
    "remove": (
        {"reroute_keep": [0.7, 0.05]},
        {},
        {"reroute": {"keep": [0.2, 0.9]}},
        {"reroute": {"schedule": "none"}},
        {"reroute_keep": "1.0,0.5"},
    ),
}


def asks_of(action: str, max_tokens: int = 16) -> list[Ask]:
    """Five image requests, each with a choice of its own, and two of text."""
    first, *more = CHOICES[action]
    images = [
        (ONE_IMAGE, first),
        (TWO_IMAGES, more[0]),
        (OTHER_IMAGE, more[1]),
        (replace(ONE_IMAGE, text=f"Well. {ONE_IMAGE.text}"), more[2]),
        (replace(TWO_IMAGES, text=f"Look here: {TWO_IMAGES.text}"), more[3]),
    ]
    asks = [
        replace(ask, options={"extra_args": choice} if choice else {}) for ask, choice in images
    ]
    return [replace(ask, max_tokens=max_tokens) for ask in (*asks, TEXT_ONLY, LONG_TEXT)]


def schedule_of(options: dict[str, Any], ask: Ask) -> RoutingSchedule:
    """The engine's schedule, as this request has it."""
    schedule = RerouteOptions.from_mapping(options).resolve(DEPTH)
    chosen = RequestOptions.of(ask.options.get("extra_args"))
    return replace(schedule, keep=chosen.keep_ratios(schedule)) if chosen else schedule


@on_runners(
    "options, step",
    {
        "reroute-whole": [REROUTE, 1200],
        "reroute-chunks": [REROUTE, 48],
        "remove-whole": [REMOVE, 1200],
        "remove-chunks": [REMOVE, 48],
    },
    v2=["reroute-chunks"],
)
def test_every_request_of_a_batch_has_its_own_budget(
    host: EngineHost, models: Any, oracles: OracleAnswers, options: dict[str, Any], step: int
) -> None:
    """Together, then one by one from the prefix cache the others have filled."""
    asks = asks_of(options.get("action", "reroute"))
    host.engine(
        **engine_args(
            models["grouped"],
            options,
            max_num_batched_tokens=step,
            max_num_seqs=16,
            enable_prefix_caching=True,
        )
    )
    before = host.call(free_blocks)
    for answers in (host.call(generate, asks), host.call(generate_one_by_one, asks)):
        for ask, answer in zip(asks, answers, strict=True):
            oracles.check("grouped", schedule_of(options, ask), ask, answer)
    assert host.call(free_blocks) == before


def test_preempted_requests_keep_their_budgets(
    v1: EngineHost, models: Any, oracles: OracleAnswers
) -> None:
    asks = asks_of("reroute", max_tokens=64)
    block_bytes = 32 * 2 * 2 * 32 * 4
    pool = {"kv_cache_memory_bytes": 230 * block_bytes, "max_model_len": 480}
    v1.engine(**engine_args(models["grouped"], REROUTE, **pool))
    seen = v1.call(stepwise, asks, every=1)
    assert seen["preempted"] >= 1
    for ask, tokens, prompt in zip(asks, seen["tokens"], seen["prompts"], strict=True):
        expected = oracles.result("grouped", schedule_of(REROUTE, ask), ask, prompt)
        assert tokens == expected.token_ids


def test_none_equals_stock_vllm(v1: EngineHost, models: Any) -> None:
    asks = [
        replace(ask, options={"extra_args": {"reroute_schedule": "none"}})
        for ask in (ONE_IMAGE, TWO_IMAGES)
    ]
    v1.engine(**engine_args(models["grouped"], None, block_size=32))
    stock = v1.call(generate, [replace(ask, options={}) for ask in asks])
    v1.engine(**engine_args(models["grouped"], REROUTE, block_size=32))
    for one, other in zip(stock, v1.call(generate, asks), strict=True):
        assert one.token_ids == other.token_ids
