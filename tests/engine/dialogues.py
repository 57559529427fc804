"""Conversations that grow: token ids, which answers come back into unchanged, and pictures in any turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from tests.engine.conftest import engine_args
from tests.engine.host import EngineHost
from tests.engine.oracle_answers import OracleAnswers
from tests.engine.probes import free_blocks, generate, stepwise
from tests.engine.requests import LONG_TEXT, TEXT_ONLY, Answer, Ask
from vllm_reroute.schedule import RerouteOptions, RoutingSchedule

BLOCK = 32
Turn = tuple[str, tuple[int, ...]]
"""What is asked, and the pictures that come with it."""

ONE_PICTURE: tuple[Turn, ...] = (
    ("What is shown?", (0,)),
    ("Is it red?", ()),
    ("Which other things lie beside it on the table, and what are they for?", ()),
)
PICTURES_LATER: tuple[Turn, ...] = (
    ("Name a season.", ()),
    ("Is it on one of both?", (0, 1)),
    ("Where?", ()),
    ("And what does this one show, above and below?", (2,)),
)


@dataclass(frozen=True)
class Dialogue(Ask):
    """A conversation of token ids, which answers come back into unchanged. token_ids: a placeholder
    per picture."""

    token_ids: tuple[int, ...] = ()
    # It would be decided anew.
    explain: bool = False

    def prompt(self) -> dict[str, Any]:
        pictures = {"multi_modal_data": {"image": self.pictures()}} if self.images else {}
        return {"prompt_token_ids": list(self.token_ids), **pictures}

    def inputs(self, processor: Any) -> Mapping[str, Any]:
        if not self.images:
            return {"input_ids": torch.tensor([self.token_ids])}
        pixels = processor.image_processor(self.pictures(), return_tensors="pt")
        visual = (pixels["pixel_values"].shape[-1] // processor.patch_size) ** 2
        ids = []
        for token in self.token_ids:
            ids += [token] * (visual if token == processor.image_token_id else 1)
        return {"input_ids": torch.tensor([ids]), "pixel_values": pixels["pixel_values"]}

    @property
    def key(self) -> Any:
        return (self.token_ids, self.images, self.max_tokens)


class Talk:
    """A conversation that grows."""

    def __init__(self, folder: Path, turns: tuple[Turn, ...], max_tokens: int = 12) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.turns, self.max_tokens = turns, max_tokens
        self.ids: list[int] = [self.tokenizer.bos_token_id]
        self.images: tuple[int, ...] = ()

    def ask(self, number: int) -> Dialogue:
        words, pictures = self.turns[number]
        text = f" USER: {'<image>' * len(pictures)}{words} ASSISTANT:"
        self.ids += self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.images += pictures
        return Dialogue("", self.images, self.max_tokens, token_ids=tuple(self.ids))

    def answered(self, answer: Answer) -> None:
        self.ids += answer.token_ids


def schedule_of(options: dict[str, Any], folder: Path) -> RoutingSchedule:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(" ASSISTANT:", add_special_tokens=False)["input_ids"]
    return replace(RerouteOptions.from_mapping(options).resolve(8), marker=tuple(ids))


def small(models: Any, options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    changes = {
        "max_num_batched_tokens": 48,
        "max_num_seqs": 16,
        "enable_prefix_caching": True,
        "limit_mm_per_prompt": {"image": 4},
        **changes,
    }
    return engine_args(models["grouped"], options, **changes)


def talk(
    host: EngineHost, oracles: OracleAnswers, schedule: RoutingSchedule, own: Talk
) -> list[tuple[Dialogue, Answer]]:
    """Turn by turn; every answer is checked and becomes part of what follows."""
    said = []
    for number in range(len(own.turns)):
        ask = own.ask(number)
        (answer,) = host.call(generate, [ask])
        oracles.check_tokens("grouped", schedule, ask, answer)
        own.answered(answer)
        said.append((ask, answer))
    return said


def reset(llm: Any) -> None:
    assert llm.reset_prefix_cache()


def asked(
    folder: Path, turns: tuple[Turn, ...], said: str = " A cup.", **fields: Any
) -> list[Dialogue]:
    """A conversation's turns, each with all before it, where every answer was the same. fields: of `Dialogue`."""
    own, asks = Talk(folder, turns), []
    for number in range(len(turns)):
        asks.append(replace(own.ask(number), **fields))
        own.ids += own.tokenizer(said, add_special_tokens=False)["input_ids"]
    return asks


def history(options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Sampling options by which a request chooses its own."""
    return {"extra_args": {"reroute": {**options, **changes}}}


def check_in_a_small_pool(
    v1: EngineHost,
    models: Any,
    oracles: OracleAnswers,
    options: dict[str, Any],
    conversations: tuple[tuple[Turn, ...], ...],
    num_blocks: int,
) -> None:
    """Turns of conversations that are said in three ways, in a pool of so many blocks: it evicts and preempts, answers
    stay, and nothing is lost."""
    folder = models["grouped"]
    schedule = schedule_of(options, folder)
    pool_bytes = num_blocks * BLOCK * 2 * 2 * 32 * 4
    v1.engine(**small(models, options, kv_cache_memory_bytes=pool_bytes, max_model_len=480))
    before = v1.call(free_blocks)
    asks: list[Any] = []
    for said in (" A cup.", " Two dogs, I think.", " A cup of hot coffee with a silver spoon."):
        for turns in conversations:
            asks += asked(folder, turns, said, max_tokens=40)
    asks += [replace(LONG_TEXT, max_tokens=64), replace(TEXT_ONLY, max_tokens=64)]
    for every in (1, 3):
        seen = v1.call(stepwise, asks, every=every)
        assert seen["preempted"] >= 2 and any(seen["cached"])
        for ask, tokens, prompt in zip(asks, seen["tokens"], seen["prompts"], strict=True):
            assert tokens == oracles.result("grouped", schedule, ask, prompt).token_ids
        assert seen["free"] == before
