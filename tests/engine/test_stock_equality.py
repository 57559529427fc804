"""Where nothing is routed, nothing changes: bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.conftest import engine_args
from tests.engine.host import EngineHost
from tests.engine.probes import generate
from tests.engine.requests import LONG_TEXT, MIXED, TEXT_ONLY, Answer

TEXTS = (TEXT_ONLY, LONG_TEXT)


def test_text_requests_equal_stock_vllm_exactly(host: EngineHost, models: Any) -> None:
    """Same tokens and the very same log-probabilities, image requests beside them or not."""
    # The same block size, so that attention sums in the same order.
    host.engine(**engine_args(models["grouped"], None, block_size=32))
    stock = [host.call(generate, [ask])[0] for ask in TEXTS]
    host.engine(**engine_args(models["grouped"], {"schedule": "pdrop"}, block_size=32))
    routed = [host.call(generate, [ask])[0] for ask in TEXTS]
    for one, other in zip(stock, routed, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
        assert one.num_created == other.num_created
    assert any(one.num_created for one in stock)


@pytest.fixture(scope="module")
def stock(v1: EngineHost, models: Any) -> list[Answer]:
    """What stock vLLM answers to a mixed batch."""
    v1.engine(**engine_args(models["grouped"], None, block_size=32))
    return v1.call(generate, MIXED)


def test_schedule_none_is_stock_vllm(v1: EngineHost, models: Any, stock: list[Answer]) -> None:
    v1.engine(**engine_args(models["grouped"], {"schedule": "none"}, block_size=32))
    assert v1.call(model_class) == "LlavaForConditionalGeneration"
    for one, other in zip(stock, v1.call(generate, MIXED), strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
        assert other.selected == []


def model_class(llm: Any) -> str:
    return llm.llm_engine.model_config.architecture


def test_keeping_everything_equals_stock_vllm(
    v1: EngineHost, models: Any, stock: list[Answer]
) -> None:
    """The machinery alone: ratios of 1 keep every token, and answers stay the dense ones."""
    v1.engine(
        **engine_args(models["grouped"], {"layers": [2, 5], "keep": [1.0, 1.0]}, block_size=32)
    )
    for ask, one, other in zip(MIXED, stock, v1.call(generate, MIXED), strict=True):
        assert one.token_ids == other.token_ids
        if ask.images:
            assert other.selected == [list(range(64 * len(ask.images)))] * 2
