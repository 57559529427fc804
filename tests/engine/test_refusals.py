"""Offline refusals, and requests that reach the engine core past every front end's check."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from tests.engine.conftest import engine_args
from tests.engine.host import EngineHost
from tests.engine.oracle_answers import OracleAnswers
from tests.engine.requests import ONE_IMAGE, Answer, Ask, greedy
from vllm_reroute.schedule import RerouteOptions

ROUTED = {"schedule": "pdrop", "tier": 128}
DEPTH = 8
ENDS_WITH_IMAGE = Ask("USER: <image>", (5,))


def try_offline(llm: Any) -> list[str]:
    """Refuse each way, then ask about the same picture. Returns the errors."""
    from vllm.sampling_params import BeamSearchParams

    good = Ask("USER: <image>\nWhat is it? ASSISTANT:", (6,))
    attempts = (
        lambda: llm.generate([good.prompt()], greedy(4, {"prompt_logprobs": 1}), use_tqdm=False),
        lambda: llm.generate([ENDS_WITH_IMAGE.prompt()], greedy(4, {}), use_tqdm=False),
        lambda: llm.beam_search([good.prompt()], BeamSearchParams(beam_width=2, max_tokens=4)),
    )
    errors = []
    for attempt in attempts:
        try:
            attempt()
        except VLLMValidationError as error:
            errors.append(str(error))
        else:
            errors.append("")
        for ask in (good, Ask("USER: <image>\nWhat? ASSISTANT:", ENDS_WITH_IMAGE.images)):
            (answer,) = llm.generate([ask.prompt()], greedy(4, {}), use_tqdm=False)
            assert answer.outputs[0].finish_reason == "length", answer
            assert len(answer.outputs[0].token_ids) == 4
    (text,) = llm.beam_search(
        [{"prompt": "USER: hello ASSISTANT:"}], BeamSearchParams(beam_width=2, max_tokens=4)
    )
    assert len(text.sequences) == 2, "text is searched as in stock vLLM"
    return errors


def ask_past_the_front_end(llm: Any, ask: Ask, options: dict[str, Any]) -> str:
    """What the engine core says to a request made by an input processor without checks."""
    from vllm.v1.engine.input_processor import InputProcessor

    engine = llm.llm_engine
    unchecked = inspect.unwrap(InputProcessor.process_inputs)
    prompt = llm._preprocess_cmpl_one(ask.prompt())
    request = unchecked(engine.input_processor, "past", prompt, greedy(4, options), ("generate",))
    try:
        engine.engine_core.add_request(request)
    except VLLMValidationError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def engine(v1: EngineHost, models: dict[str, Path]) -> EngineHost:
    return v1.engine(**engine_args(models["multi-head"], ROUTED))


def test_offline(engine: EngineHost) -> None:
    prompt_logprobs, ends, beam = engine.call(try_offline)
    assert "Leave prompt_logprobs out" in prompt_logprobs
    assert "Put the question after the image" in ends
    assert "Leave use_beam_search out" in beam


def test_the_engine_core_refuses_for_itself(engine: EngineHost) -> None:
    options = {"prompt_logprobs": 1}
    assert "Leave prompt_logprobs out" in engine.call(ask_past_the_front_end, ONE_IMAGE, options)


async def _through_async_llm(args: dict[str, Any]) -> dict[str, Any]:
    """Refusals, a request past the front end, and a good one, in an engine of two processes."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
    found: dict[str, Any] = {}

    async def last(name: str, prompt: Any, params: Any) -> Any:
        result = None
        async for output in llm.generate(prompt, params, name):
            result = output
        return result

    try:
        for name, ask, options in (
            ("prompt_logprobs", ONE_IMAGE, {"prompt_logprobs": 1}),
            ("ends", ENDS_WITH_IMAGE, {}),
        ):
            try:
                await last(name, ask.prompt(), greedy(4, options))
            except VLLMValidationError as error:
                found[name] = str(error)
        unchecked = inspect.unwrap(InputProcessor.process_inputs)
        other = Ask(ONE_IMAGE.text, (3,))
        request = unchecked(
            llm.input_processor,
            "past",
            other.prompt(),
            greedy(4, {"prompt_logprobs": 1}),
            ("generate",),
        )
        # vLLM 0.32 finishes it with an error, 0.33 also hands the error itself to the client.
        try:
            past = await asyncio.wait_for(last("past", request, request.sampling_params), 60)
            found["past"] = past.outputs[0].finish_reason
        except VLLMValidationError as error:
            found["past"] = str(error)
        for name, ask in (("same picture", other), ("good", ONE_IMAGE)):
            output = await asyncio.wait_for(last(name, ask.prompt(), ask.sampling_params()), 60)
            found[name] = Answer(
                list(output.prompt_token_ids), list(output.outputs[0].token_ids), [], []
            )
    finally:
        llm.shutdown()
    return found


def run_async_llm(llm: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Beside the process's own engine, which is not used; its engine core has a process in any case."""
    return asyncio.run(_through_async_llm(args))


def test_async_llm(engine: EngineHost, models: dict[str, Path], oracles: OracleAnswers) -> None:
    found = engine.call(run_async_llm, engine_args(models["multi-head"], ROUTED))
    assert "Leave prompt_logprobs out" in found["prompt_logprobs"]
    assert "Put the question after the image" in found["ends"]
    assert found["past"] == "error" or "Leave prompt_logprobs out" in found["past"]
    schedule = RerouteOptions(**ROUTED).resolve(DEPTH)
    for name, ask in (("same picture", Ask(ONE_IMAGE.text, (3,))), ("good", ONE_IMAGE)):
        expected = oracles.result("multi-head", schedule, ask, found[name].prompt_token_ids)
        assert found[name].token_ids == expected.token_ids
