"""Conversations whose later questions bring back visual tokens of earlier turns."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from tests.engine import dialogues
from tests.engine.dialogues import (
    ONE_PICTURE,
    Dialogue,
    Talk,
    Turn,
    asked,
    check_in_a_small_pool,
    history,
    reset,
    schedule_of,
    small,
    talk,
)
from tests.engine.host import EngineHost
from tests.engine.oracle_answers import OracleAnswers
from tests.engine.probes import free_blocks, generate, generate_one_by_one, scheduler_of
from tests.engine.requests import TEXT_ONLY, Answer
from tests.engine.runners import on_runners
from vllm_reroute.schedule import RoutingSchedule

RECALL: dict[str, Any] = {"layers": [1, 3, 6], "keep": [0.5, 0.1, 0.8], "history": "recall"}
FEW: dict[str, Any] = {"layers": [2, 5], "keep": [0.3, 0.02], "history": "recall"}
"""The second stage holds as much as it may after one question."""

FOLLOWED_UP: tuple[Turn, ...] = (*ONE_PICTURE, ("Why?", ()))
PICTURES_LATER: tuple[Turn, ...] = (
    *dialogues.PICTURES_LATER,
    ("Which of all of them is the oldest?", ()),
)


def brought_back(
    schedule: RoutingSchedule, oracles: OracleAnswers, ask: Dialogue, answer: Answer
) -> int:
    """Visual tokens that recalling adds to what `keep` holds in all stages."""
    keeps = replace(schedule, history="keep")
    held = [
        sum(map(len, oracles.result("grouped", of, ask, answer.prompt_token_ids).selected))
        for of in (schedule, keeps)
    ]
    return held[0] - held[1]


def evict(llm: Any, seed: int, share: float) -> None:
    """Some of all blocks that the prefix cache has are gone."""
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    cached = [block.block_id for block in pool.blocks if block.block_hash is not None]
    pool.evict_blocks(set(random.Random(seed).sample(cached, int(share * len(cached)))))


@on_runners(
    "options, step",
    {"in-chunks": [RECALL, 48], "few-and-whole": [FEW, 600]},
    v2=["in-chunks"],
)
def test_a_conversation_is_the_same_cold_and_turn_by_turn(
    host: EngineHost, models: Any, oracles: OracleAnswers, options: dict[str, Any], step: int
) -> None:
    folder = models["grouped"]
    schedule = schedule_of(options, folder)
    host.engine(**small(models, options, max_num_batched_tokens=step))
    host.call(reset)
    free = host.call(free_blocks)
    said = []
    for turns in (FOLLOWED_UP, PICTURES_LATER):
        own = talk(host, oracles, schedule, Talk(folder, turns))
        for (_, answer), (before, earlier) in zip(own[1:], own, strict=False):
            # The last token of an answer has not run.
            known = len(earlier.prompt_token_ids) + len(earlier.token_ids) - 1
            assert answer.num_cached == known if before.images else answer.num_cached <= known
        assert brought_back(schedule, oracles, *own[-1]) > 0
        said += own
    host.call(reset)
    # All turns are decided, and told to those that ask: once together, once each from the cache.
    asks: list[Any] = [replace(ask, explain=True) for ask, _ in said]
    cold = host.call(generate, [*asks, TEXT_ONLY])
    for (_, answer), ask, again in zip(said, asks, cold, strict=False):
        assert again.token_ids == answer.token_ids
        oracles.check_tokens("grouped", schedule, ask, again)
    for ask, again in zip(asks[-2:], host.call(generate_one_by_one, asks[-2:]), strict=True):
        oracles.check_tokens("grouped", schedule, ask, again)
        assert 0 < again.num_cached < len(again.prompt_token_ids)
    # What is gone from the cache costs time.
    for seed in range(3):
        host.call(evict, seed, share=(0.1, 0.3, 0.6)[seed])
        for ask, _ in said[3:1:-1] + said[:6:-1]:
            (again,) = host.call(generate, [ask])
            oracles.check_tokens("grouped", schedule, ask, again)
    assert host.call(free_blocks) == free


def test_a_small_pool_evicts_and_preempts(
    v1: EngineHost, models: Any, oracles: OracleAnswers
) -> None:
    """Parts of what turns have kept, brought back or parked are gone, running requests lose theirs."""
    conversations = (FOLLOWED_UP, PICTURES_LATER[1:])
    check_in_a_small_pool(v1, models, oracles, RECALL, conversations, num_blocks=220)


def test_a_request_chooses_its_history(v1: EngineHost, models: Any, oracles: OracleAnswers) -> None:
    """All kinds side by side, from the same cache, at more than one budget; long prompts in small parts."""
    folder = models["grouped"]
    options = {**RECALL, "history": "rerank", "turn_marker": "ASSISTANT:"}
    recalls = schedule_of(RECALL, folder)
    v1.engine(**small(models, options, max_num_batched_tokens=600, long_prefill_token_threshold=40))
    for keep in (None, (0.3, 0.3, 0.3)):
        budget = {"keep": list(keep)} if keep else {}
        grows = Talk(folder, PICTURES_LATER)
        for number in range(len(PICTURES_LATER)):
            ask = grows.ask(number)
            kinds = ("recall", "keep", "rerank")
            asks = [replace(ask, options=history({"history": kind, **budget})) for kind in kinds]
            answers = v1.call(generate, [*asks, TEXT_ONLY])
            for kind, answer in zip(kinds, answers, strict=False):
                schedule = replace(recalls, keep=keep or recalls.keep, history=kind)
                oracles.check_tokens("grouped", schedule, ask, answer)
            grows.answered(answers[0])


def test_without_a_prefix_cache(v1: EngineHost, models: Any, oracles: OracleAnswers) -> None:
    """Every turn is run in one go, and what waits to be brought back waits in pages all the same."""
    folder = models["grouped"]
    schedule = schedule_of(RECALL, folder)
    v1.engine(**small(models, RECALL, enable_prefix_caching=False, async_scheduling=False))
    before = v1.call(free_blocks)
    asks = [
        ask for turns in (FOLLOWED_UP, PICTURES_LATER) for ask in asked(folder, turns, explain=True)
    ]
    for ask, answer in zip(asks, v1.call(generate, asks), strict=True):
        oracles.check_tokens("grouped", schedule, ask, answer)
    assert v1.call(free_blocks) == before
