"""Holds conversations over the OpenAI API, many at once: each turn is asked behind the model's own earlier answers."""

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import openai

from benchmarks.grounding.conversations import Conversation
from benchmarks.grounding.questions import Question
from benchmarks.grounding.scenes import render
from benchmarks.quality.asking import Endpoint, Prompt, ask, prompt_of
from benchmarks.quality.outcomes import Outcome


@dataclass(frozen=True, kw_only=True)
class TalkTurn:
    """turn: from 1. new_picture: the prompt's picture comes with it."""

    prompt: Prompt
    turn: int
    new_picture: bool


# All turns of one conversation.
Talk = tuple[TalkTurn, ...]


def talks_of(conversations: Iterable[Conversation]) -> list[Talk]:
    """Ready to be held; their questions are numbered through."""
    talks: list[Talk] = []
    index = 0
    for conversation in conversations:
        talk: list[TalkTurn] = []
        pictures = [render(scene) for scene in conversation.scenes]
        before = ""
        for number, turn in enumerate(conversation.turns, start=1):
            question = Question(
                image=pictures[turn.picture],
                text=turn.asked.text,
                answer=turn.asked.answer,
                kind=turn.kind,
                scene_seed=conversation.scenes[turn.picture].seed,
            )
            alone = prompt_of(index, question)
            before = hashlib.sha256((before + alone.digest).encode()).hexdigest()[:16]
            prompt = Prompt(
                index=index,
                digest=before,
                kind=alone.kind,
                expected=alone.expected,
                text=alone.text,
                picture=alone.picture,
            )
            first = number == 1 or turn.picture != conversation.turns[number - 2].picture
            talk.append(TalkTurn(prompt=prompt, turn=number, new_picture=first))
            index += 1
        talks.append(tuple(talk))
    return talks


def turns_of(talks: Sequence[Talk]) -> list[TalkTurn]:
    """Of all conversations, in the order of their numbers."""
    return [turn for talk in talks for turn in talk]


def hold_all(
    endpoint: Endpoint,
    talks: Sequence[Talk],
    concurrency: int,
    on_outcome: Callable[[Outcome], None],
) -> None:
    """Holds all of them, `concurrency` at a time; `on_outcome` gets each turn's outcome as soon as it is there."""
    asyncio.run(_hold_all(endpoint, talks, concurrency, on_outcome))


async def _hold_all(
    endpoint: Endpoint,
    talks: Sequence[Talk],
    concurrency: int,
    on_outcome: Callable[[Outcome], None],
) -> None:
    places = asyncio.Semaphore(concurrency)

    async def in_place(client: openai.AsyncOpenAI, talk: Talk) -> None:
        async with places:
            await hold(client, endpoint.model, talk, on_outcome)

    async with endpoint.client() as client, asyncio.TaskGroup() as tasks:
        for talk in talks:
            tasks.create_task(in_place(client, talk))


async def hold(
    client: openai.AsyncOpenAI, model: str, talk: Talk, on_outcome: Callable[[Outcome], None]
) -> None:
    """One conversation. After a turn that got no answer the later ones are not asked."""
    messages: list = []
    for turn in talk:
        messages.append({"role": "user", "content": content_of(turn)})
        outcome = await ask(client, model, turn.prompt, messages)
        on_outcome(outcome)
        if outcome.answer is None:
            return
        # The space before it is the template's.
        messages.append({"role": "assistant", "content": outcome.answer.strip()})


def content_of(turn: TalkTurn) -> list[dict]:
    (message,) = turn.prompt.messages
    return message["content"] if turn.new_picture else message["content"][1:]
