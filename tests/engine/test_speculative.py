"""Drafts from the prompt (n-grams): tokens are those of plain decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.conftest import engine_args
from tests.engine.dialogues import asked, history, schedule_of
from tests.engine.host import EngineHost
from tests.engine.oracle_answers import OracleAnswers
from tests.engine.probes import free_blocks, generate, generate_one_by_one, scheduler_of
from tests.engine.test_progress import CHAT, OPTIONS
from tests.engine.test_recalled_turns import FOLLOWED_UP
from vllm_reroute.schedule import RerouteOptions

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}


def drafted(llm: Any, asks: Any) -> tuple[list[Any], int, int]:
    """Answers, drafted tokens and accepted ones."""
    counts = [0, 0]
    make = type(scheduler_of(llm)).make_spec_decoding_stats

    def counting(
        self: Any, stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *a: Any, **k: Any
    ) -> Any:
        counts[0] += num_draft_tokens
        counts[1] += num_accepted_tokens
        return make(self, stats, num_draft_tokens, num_accepted_tokens, *a, **k)

    type(scheduler_of(llm)).make_spec_decoding_stats = counting
    try:
        answers = generate(llm, asks) + generate_one_by_one(llm, asks)
    finally:
        type(scheduler_of(llm)).make_spec_decoding_stats = make
    return answers, *counts


@pytest.fixture
def new_host() -> Iterator[EngineHost]:
    """A process of its own: vLLM's drafting kernels can be registered once in a CPU process.

    The V1 runner's: V2 drafts with a kernel that Triton's interpreter cannot run.
    """
    host = EngineHost()
    yield host
    host.close()


def test_ngram_drafts_change_no_answer(
    new_host: EngineHost, models: Any, oracles: OracleAnswers
) -> None:
    """In chunks beside each other, then one by one from the prefix cache; some drafts are right, most
    are not. Questions that bring tokens back, too."""
    schedule = RerouteOptions.from_mapping(OPTIONS).resolve(8)
    recalls = schedule_of({**OPTIONS, "history": "recall"}, models["grouped"])
    back = [
        replace(ask, options=history({"history": "recall"}))
        for ask in asked(models["grouped"], FOLLOWED_UP)
    ]
    host = new_host
    host.engine(
        **engine_args(
            models["grouped"],
            {**OPTIONS, "turn_marker": "ASSISTANT:"},
            max_num_batched_tokens=64,
            max_num_seqs=8,
            enable_prefix_caching=True,
            speculative_config=NGRAM,
        )
    )
    before = host.call(free_blocks)
    answers, num_drafted, num_accepted = host.call(drafted, [*CHAT, *back])
    for ask, answer in zip([*CHAT, *back] * 2, answers, strict=True):
        if ask in CHAT:
            oracles.check("grouped", schedule, ask, answer)
        else:
            oracles.check_tokens("grouped", recalls, ask, answer)
    assert num_drafted > 20 and 0 < num_accepted < num_drafted
    assert host.call(free_blocks) == before
