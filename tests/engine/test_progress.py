"""Prompts in chunks, from the prefix cache, and both: the answers are those of whole prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.engine.conftest import engine_args
from tests.engine.host import EngineHost
from tests.engine.oracle_answers import OracleAnswers
from tests.engine.probes import (
    fill_by_kernel,
    free_blocks,
    generate,
    runner_name,
    stepwise,
)
from tests.engine.requests import (
    LONG_TEXT,
    MIXED,
    ONE_IMAGE,
    TEXT_ONLY,
    TWO_IMAGES,
    Ask,
)
from tests.engine.runners import on_runners
from vllm_reroute.schedule import RerouteOptions

BLOCK = 32
OPTIONS: dict[str, Any] = {"layers": [1, 3, 6], "keep": [0.5, 0.1, 0.8]}
REMOVE: dict[str, Any] = {"layers": [2, 5], "keep": [0.4, 0.2], "action": "remove"}
SYSTEM = "SYSTEM: " + "First count what lies above, below and around each object. " * 5

# One picture, more and more said about it; then another question, and the picture after another one.
CHAT = (
    Ask(f"{SYSTEM}USER: <image>\nWhat is shown? ASSISTANT:", (0,)),
    Ask(
        f"{SYSTEM}USER: <image>\nWhat is shown? ASSISTANT: A cup. USER: Its colour? ASSISTANT:",
        (0,),
    ),
    Ask(
        f"{SYSTEM}USER: <image>\nWhat is shown? ASSISTANT: A cup. USER: Its colour? ASSISTANT: Red, I "
        "would say, like the plate below it. USER: And now compare it with <image> please. ASSISTANT:",
        (0, 1),
    ),
    Ask(f"{SYSTEM}USER: <image>\nIs there a spoon, and where does it lie? ASSISTANT:", (0,)),
    Ask(f"{SYSTEM}USER: <image> <image>\nWhich of both is older? ASSISTANT:", (0, 1)),
    Ask(f"{SYSTEM}USER: <image>\nWhich season is it outside the window? ASSISTANT:", (1,)),
    Ask(f"{SYSTEM}USER: Name a colour and an animal of that colour. ASSISTANT:"),
)


def small(models: Any, options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """An engine with steps of few tokens and the prefix cache on."""
    changes = {
        "max_num_batched_tokens": 48,
        "max_num_seqs": 16,
        "enable_prefix_caching": True,
        **changes,
    }
    return engine_args(models["grouped"], options, **changes)


def check(oracles: OracleAnswers, options: dict[str, Any], asks: Any, answers: Any) -> None:
    schedule = RerouteOptions.from_mapping(options).resolve(8)
    for ask, answer in zip(asks, answers, strict=True):
        oracles.check("grouped", schedule, ask, answer)


def check_seen(oracles: OracleAnswers, options: dict[str, Any], asks: Any, seen: Any) -> None:
    schedule = RerouteOptions.from_mapping(options).resolve(8)
    answers = zip(asks, seen["tokens"], seen["prompts"], seen["decisions"], strict=True)
    for ask, tokens, prompt, kept in answers:
        expected = oracles.result("grouped", schedule, ask, prompt)
        assert tokens == expected.token_ids
        if ask.images:
            assert kept == expected.selected


@on_runners("options", {"reroute": [OPTIONS], "remove": [REMOVE]}, v2=["reroute"])
def test_prompts_longer_than_a_step_run_in_chunks(
    host: EngineHost, models: Any, oracles: OracleAnswers, options: dict[str, Any]
) -> None:
    """Steps of 48 tokens, prompts of up to 290, decodes beside them; stages run in pieces.

    On V2 what attention reads is filled by the kernel that GPUs use.
    """
    host.engine(**small(models, options))
    if host.call(runner_name) == "V2":
        host.call(fill_by_kernel)
    before = host.call(free_blocks)
    check(oracles, options, MIXED, host.call(generate, MIXED))
    seen = host.call(stepwise, CHAT, every=1)
    check_seen(oracles, options, CHAT, seen)
    assert seen["free"] == before


def test_chunks_without_a_prefix_cache(v1: EngineHost, models: Any, oracles: OracleAnswers) -> None:
    v1.engine(**small(models, OPTIONS, enable_prefix_caching=False))
    answers = v1.call(generate, CHAT)
    check(oracles, OPTIONS, CHAT, answers)
    assert all(answer.num_cached == 0 for answer in answers)


@on_runners(
    "options, step",
    {"whole": [OPTIONS, 600], "chunks": [OPTIONS, 48], "remove": [REMOVE, 600]},
    v2=["chunks"],
)
def test_what_is_cached_changes_no_answer(
    host: EngineHost, models: Any, oracles: OracleAnswers, options: dict[str, Any], step: int
) -> None:
    """One after the other, each finds the common text, and the pictures where they come first."""
    host.engine(**small(models, options, max_num_batched_tokens=step))
    assert host.call(with_empty_cache)
    cached = []
    for ask in CHAT:
        (answer,) = host.call(generate, [ask])
        check(oracles, options, [ask], [answer])
        cached.append(answer.num_cached)
    text = cached[-1]
    assert cached[0] == 0 and text >= 2 * BLOCK
    # Every later prompt with the first picture in front finds it; one with another picture does not.
    assert all(n >= text + 2 * BLOCK for n in cached[1:5]) and cached[5] == text


def test_prefixes_written_in_the_same_step_are_read(
    host: EngineHost, models: Any, oracles: OracleAnswers
) -> None:
    """All at once, with a common text and common pictures: some read what others just write."""
    host.engine(**small(models, OPTIONS, max_num_batched_tokens=1200))
    answers = host.call(generate, CHAT)
    check(oracles, OPTIONS, CHAT, answers)
    assert sum(answer.num_cached for answer in answers) > 0


def test_a_small_pool_evicts_and_preempts(
    host: EngineHost, models: Any, oracles: OracleAnswers
) -> None:
    """Parts of cached prompts are gone, running requests lose theirs: answers stay."""
    long = tuple(replace(ask, max_tokens=64) for ask in (*CHAT, LONG_TEXT, TEXT_ONLY))
    block_bytes = BLOCK * 2 * 2 * 32 * 4
    host.engine(
        **small(models, OPTIONS, kv_cache_memory_bytes=260 * block_bytes, max_model_len=480)
    )
    before = host.call(free_blocks)
    # V2 takes ten times as long.
    for every in (1, 3) if host.call(runner_name) == "V1" else (1,):
        seen = host.call(stepwise, long, every=every)
        assert seen["preempted"] >= 2
        check_seen(oracles, OPTIONS, long, seen)
        assert seen["free"] == before


def with_empty_cache(llm: Any) -> bool:
    """The engine may be that of the test before."""
    return llm.reset_prefix_cache()


def reset_between(llm: Any, asks: Any) -> list[Any]:
    """Answers with the prefix cache emptied before each request, then all again."""
    answers = []
    for ask in asks:
        assert llm.reset_prefix_cache()
        answers += generate(llm, [ask])
    return answers + generate(llm, asks)


def test_the_cache_can_be_reset(v1: EngineHost, models: Any, oracles: OracleAnswers) -> None:
    asks = CHAT[:3]
    v1.engine(**small(models, OPTIONS, max_num_batched_tokens=600))
    answers = v1.call(reset_between, asks)
    check(oracles, OPTIONS, asks * 2, answers)
    assert [answer.num_cached for answer in answers[:3]] == [0, 0, 0]


def salted(llm: Any, ask: Ask, salts: list[str]) -> list[int]:
    """Cached tokens of the same request under different cache salts."""
    cached = []
    for salt in salts:
        prompt = {**ask.prompt(), "cache_salt": salt}
        (output,) = llm.generate([prompt], ask.sampling_params(), use_tqdm=False)
        cached.append(output.num_cached_tokens)
    return cached


def test_a_cache_salt_keeps_requests_apart(v1: EngineHost, models: Any) -> None:
    v1.engine(**small(models, OPTIONS, max_num_batched_tokens=600))
    first, other, again = v1.call(salted, CHAT[0], ["one", "two", "one"])
    assert first == other == 0 and again >= 4 * BLOCK


def sampled(llm: Any, asks: Any) -> list[list[int]]:
    """Tokens drawn with seeds, all requests together."""
    asks = [replace(ask, options={"temperature": 1.0, "seed": 7}) for ask in asks]
    outputs = llm.generate(
        [ask.prompt() for ask in asks], [ask.sampling_params() for ask in asks], use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_a_seed_draws_alike_in_chunks(v1: EngineHost, models: Any) -> None:
    """Steps in which only part of a prompt runs draw nothing."""
    asks = (ONE_IMAGE, LONG_TEXT, TWO_IMAGES)
    drawn = []
    for step in (600, 48):
        v1.engine(**small(models, OPTIONS, max_num_batched_tokens=step))
        drawn.append(v1.call(sampled, asks))
    assert drawn[0] == drawn[1]
    assert len({tuple(tokens[:4]) for tokens in drawn[0]}) == 3
