"""Asks questions over the OpenAI API, many at once. A request that fails is an outcome of its own, never an answer."""

import asyncio
import base64
import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import openai

from benchmarks.grounding.questions import ANSWER_TOKENS, Question
from benchmarks.quality.outcomes import Outcome
from benchmarks.quality.replies import answer_in

SAMPLING: dict[str, Any] = {"max_tokens": ANSWER_TOKENS, "temperature": 0}
ERROR_LENGTH = 300


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question ready to be sent. picture: a data URL."""

    index: int
    digest: str
    kind: str
    expected: str
    text: str
    picture: str

    @property
    def messages(self) -> list:
        content = [
            {"type": "image_url", "image_url": {"url": self.picture}},
            {"type": "text", "text": self.text},
        ]
        return [{"role": "user", "content": content}]


def prompt_of(index: int, question: Question) -> Prompt:
    """The digest is of pixels, not of the file, so that it does not depend on how PNG is compressed."""
    image = question.image.convert("RGB")
    digest = hashlib.sha256(repr((image.size, question.text, question.answer)).encode())
    digest.update(image.tobytes())
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return Prompt(
        index=index,
        digest=digest.hexdigest()[:16],
        kind=question.kind,
        expected=question.answer,
        text=question.text,
        picture="data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
    )


def prompts_of(questions: Iterable[Question]) -> list[Prompt]:
    return [prompt_of(index, question) for index, question in enumerate(questions)]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server to ask. url: up to and with /v1. model: the name it serves. timeout_s: of one request."""

    url: str
    model: str
    api_key: str = "none"
    timeout_s: float = 300

    def client(self) -> openai.AsyncOpenAI:
        # A request is sent once: what was not answered is asked again by the next run.
        return openai.AsyncOpenAI(
            base_url=self.url, api_key=self.api_key, max_retries=0, timeout=self.timeout_s
        )


def ask_all(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    concurrency: int,
    on_outcome: Callable[[Outcome], None],
) -> None:
    """Asks all prompts, `concurrency` at a time; `on_outcome` gets each outcome as soon as it is there."""
    asyncio.run(_ask_all(endpoint, prompts, concurrency, on_outcome))


async def _ask_all(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    concurrency: int,
    on_outcome: Callable[[Outcome], None],
) -> None:
    turns = asyncio.Semaphore(concurrency)

    async def in_turn(client: openai.AsyncOpenAI, prompt: Prompt) -> None:
        async with turns:
            on_outcome(await ask(client, endpoint.model, prompt))

    async with endpoint.client() as client, asyncio.TaskGroup() as tasks:
        for prompt in prompts:
            tasks.create_task(in_turn(client, prompt))


async def ask(
    client: openai.AsyncOpenAI, model: str, prompt: Prompt, messages: list | None = None
) -> Outcome:
    """The outcome of one request, whatever happens to it. messages: more than the prompt's own."""
    try:
        reply = await client.chat.completions.create(
            model=model, messages=messages or prompt.messages, **SAMPLING
        )
        answer, finish_reason = answer_in(reply)
    except (openai.OpenAIError, ValueError) as error:
        return _outcome(prompt, error=f"{type(error).__name__}: {error}"[:ERROR_LENGTH])
    return _outcome(prompt, answer=answer, finish_reason=finish_reason)


def _outcome(prompt: Prompt, **how: str) -> Outcome:
    return Outcome(
        index=prompt.index,
        digest=prompt.digest,
        kind=prompt.kind,
        expected=prompt.expected,
        **how,
    )


def visual_tokens_in(endpoint: Endpoint, prompt: Prompt, image_token: int) -> int:
    """How many visual tokens the server makes of the prompt's picture, counted in the token ids it reports."""
    return asyncio.run(_visual_tokens_in(endpoint, prompt, image_token))


async def _visual_tokens_in(endpoint: Endpoint, prompt: Prompt, image_token: int) -> int:
    async with endpoint.client() as client:
        reply: Any = await client.chat.completions.create(
            model=endpoint.model,
            messages=prompt.messages,
            extra_body={"return_token_ids": True},
            **SAMPLING,
        )
    return reply.prompt_token_ids.count(image_token)
