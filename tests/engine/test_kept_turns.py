"""Conversations that keep what a picture's own question has chosen: cold, turn by turn, and together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.engine.dialogues import (
    BLOCK,
    ONE_PICTURE,
    PICTURES_LATER,
    Talk,
    check_in_a_small_pool,
    history,
    reset,
    schedule_of,
    small,
    talk,
)
from tests.engine.host import EngineHost
from tests.engine.oracle_answers import OracleAnswers
from tests.engine.probes import free_blocks, generate
from tests.engine.requests import TEXT_ONLY
from tests.engine.runners import on_runners

REROUTE: dict[str, Any] = {"layers": [1, 3, 6], "keep": [0.5, 0.1, 0.8], "history": "keep"}
REMOVE: dict[str, Any] = {
    "layers": [2, 5],
    "keep": [0.4, 0.2],
    "action": "remove",
    "history": "keep",
}


@on_runners(
    "options, step",
    {"reroute-in-chunks": [REROUTE, 48], "remove": [REMOVE, 600]},
    v2=["reroute-in-chunks"],
)
def test_a_conversation_is_the_same_cold_and_turn_by_turn(
    host: EngineHost, models: Any, oracles: OracleAnswers, options: dict[str, Any], step: int
) -> None:
    """Later turns run their new text only, whatever a stage holds of the pictures before it."""
    folder = models["grouped"]
    schedule = schedule_of(options, folder)
    host.engine(**small(models, options, max_num_batched_tokens=step))
    host.call(reset)
    before = host.call(free_blocks)
    said = []
    for turns in (ONE_PICTURE, PICTURES_LATER):
        own = talk(host, oracles, schedule, Talk(folder, turns))
        for (_, answer), (asked, earlier) in zip(own[1:], own, strict=False):
            # The last token of an answer has not run.
            known = len(earlier.prompt_token_ids) + len(earlier.token_ids) - 1
            # A conversation without a picture yet is cached as stock vLLM does it, in whole blocks.
            assert answer.num_cached == (known if asked.images else known // BLOCK * BLOCK)
        said += own
    # Another question about the same picture finds what the first one has not chosen.
    other = talk(
        host, oracles, schedule, Talk(folder, (("Where is this?", (0,)), *ONE_PICTURE[1:]))
    )
    prompts = said[0][1].prompt_token_ids, other[0][1].prompt_token_ids
    common = next(i for i, (one, two) in enumerate(zip(*prompts, strict=False)) if one != two)
    assert 0 < other[0][1].num_cached == common // BLOCK * BLOCK
    assert other[1][1].num_cached > len(prompts[1])
    host.call(reset)
    asks = [ask for ask, _ in said]
    # All turns are decided, and told to those that ask: once together, once each from the cache.
    asks = [replace(ask, explain=True) for ask in asks]
    cold = host.call(generate, [*asks, TEXT_ONLY])
    for (_, answer), ask, again in zip(said, asks, cold, strict=False):
        assert again.token_ids == answer.token_ids
        oracles.check_tokens("grouped", schedule, ask, again)
    (again,) = host.call(generate, asks[-1:])
    oracles.check_tokens("grouped", schedule, asks[-1], again)
    # From the states that the first pictures' question finds: it is decided again.
    first_decided = said[len(ONE_PICTURE) + 1][1]
    assert 0 < again.num_cached < len(first_decided.prompt_token_ids)
    assert host.call(free_blocks) == before


def test_a_small_pool_evicts_and_preempts(
    v1: EngineHost, models: Any, oracles: OracleAnswers
) -> None:
    """Parts of what turns have kept are gone, running requests lose theirs: answers stay."""
    conversations = (ONE_PICTURE, PICTURES_LATER[1:])
    check_in_a_small_pool(v1, models, oracles, REROUTE, conversations, num_blocks=200)


def test_a_request_chooses_its_history(v1: EngineHost, models: Any, oracles: OracleAnswers) -> None:
    """Both kinds side by side, from the same cache, at more than one budget."""
    folder = models["grouped"]
    options = {**REROUTE, "history": "rerank", "turn_marker": "ASSISTANT:"}
    keeps = schedule_of(REROUTE, folder)
    v1.engine(**small(models, options, max_num_batched_tokens=600))
    for keep in (None, (0.3, 0.3, 0.3)):
        own = {"history": "keep", **({"keep": list(keep)} if keep else {})}
        schedule = replace(keeps, keep=keep or keeps.keep)
        grows, first = Talk(folder, ONE_PICTURE), None
        for number in range(3):
            ask = grows.ask(number)
            chosen = replace(ask, options=history(own))
            kept, ranked = v1.call(generate, [chosen, ask])
            oracles.check_tokens("grouped", schedule, ask, kept)
            oracles.check_tokens("grouped", replace(keeps, history="rerank"), ask, ranked)
            grows.answered(kept)
            first = first or kept
        assert kept.num_cached >= len(first.prompt_token_ids) > first.num_cached
        assert ranked.num_cached > 0
