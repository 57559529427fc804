"""What clients do: one function per kind of request, drawn by weight."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from benchmarks.photos import PHOTOS

Body = dict[str, Any]
QUESTIONS = ("What is shown?", "Which animal is this?", "Describe it.", "How many are there?")
ODD_SIZES = ((1, 1), (3, 400), (640, 5), (37, 53), (500, 500))


@dataclass(frozen=True)
class Kind:
    """name: in the report. make: a chat completion's body. status: what the server must answer.

    cut: whether the client leaves before the answer is complete. routed_only: a stock server
    answers it.
    """

    name: str
    make: Callable[[random.Random], Body]
    weight: int
    status: int = 200
    cut: bool = False
    routed_only: bool = False


def picture(rng: random.Random, size: tuple[int, int] | None = None) -> str:
    """A data URL: one of 40 crops that come back again and again, or one of the given size."""
    photo = rng.choice(PHOTOS[:4]).image
    if size is None:
        shift = 7 * rng.randrange(10)
        photo = photo.crop((shift, shift, shift + 160, shift + 160))
    else:
        photo = photo.resize(size)
    return _url(photo)


def _url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _turn(*parts: str) -> Body:
    """Data URLs become images, the rest is text."""
    content = [
        {"type": "image_url", "image_url": {"url": part}}
        if part.startswith("data:")
        else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def _body(rng: random.Random, *turns: Body, **options: Any) -> Body:
    return {"messages": list(turns), "max_tokens": rng.randint(1, 24), **options}


def _image(rng: random.Random, **options: Any) -> Body:
    return _body(rng, _turn(picture(rng), rng.choice(QUESTIONS)), **options)


def _several(rng: random.Random) -> Body:
    pictures = [picture(rng) for _ in range(rng.randint(2, 3))]
    return _body(rng, _turn("First", *pictures, rng.choice(QUESTIONS)))


def _odd(rng: random.Random) -> Body:
    return _body(rng, _turn(picture(rng, rng.choice(ODD_SIZES)), rng.choice(QUESTIONS)))


def _text(rng: random.Random, **options: Any) -> Body:
    return _body(rng, _turn("Count the birds. " * rng.randint(1, 20)), **options)


def _conversation(rng: random.Random) -> Body:
    said = {"role": "assistant", "content": "A house and a cat."}
    return _body(rng, _turn(picture(rng), "What is it?"), said, _turn(rng.choice(QUESTIONS)))


def _choice(rng: random.Random) -> Body:
    return _image(rng, structured_outputs={"choice": ["cat", "house"]})


def _broken(rng: random.Random) -> Body:
    whole = base64.b64decode(picture(rng).partition(",")[2])
    cut = base64.b64encode(whole[: rng.randrange(40, len(whole) // 2)]).decode()
    return _body(rng, _turn(f"data:image/png;base64,{cut}", "What is it?"))


def _too_long(rng: random.Random) -> Body:
    return _body(rng, _turn("Count the birds. " * 20_000))


# None with a seed: vLLM 0.32's V1 runner on CPU ends when a seeded request's prompt runs in chunks.
KINDS = (
    Kind("text", _text, 10),
    Kind("text, streamed", lambda rng: _text(rng, stream=True), 6),
    Kind("image", _image, 20),
    Kind("image, streamed", lambda rng: _image(rng, stream=True), 12),
    Kind("image, three answers", lambda rng: _image(rng, n=3, temperature=1.0), 5),
    Kind("image, log-probabilities", lambda rng: _image(rng, logprobs=True, top_logprobs=3), 4),
    Kind("several images", _several, 8),
    Kind("odd image", _odd, 6),
    Kind("conversation", _conversation, 6),
    Kind("structured", _choice, 4),
    Kind("broken image", _broken, 4, status=400),
    Kind("longer than the model", _too_long, 1, status=400),
    Kind("wrong parameter", lambda rng: _image(rng, temperature=-1), 2, status=400),
    Kind("min_tokens too high", lambda rng: _image(rng, min_tokens=99), 2, status=400),
    Kind("prompt_logprobs", lambda rng: _image(rng, prompt_logprobs=1), 4, 400, routed_only=True),
    Kind("echo, streamed", lambda rng: _image(rng, echo=True, stream=True), 2, 400, False, True),
    Kind("beam search", lambda rng: _image(rng, use_beam_search=True), 2, 400, False, True),
    Kind(
        "client leaves", lambda rng: _image(rng, max_tokens=64, n=2, temperature=1.0), 6, cut=True
    ),
    Kind(
        "client leaves a stream", lambda rng: _image(rng, max_tokens=64, stream=True), 6, cut=True
    ),
)


def draw(seed: int, number: int, *, routed: bool) -> tuple[Kind, Body]:
    """Request `number` of the storm `seed`: the same whenever it is drawn."""
    rng = random.Random(f"{seed}/{number}")
    kinds = [kind for kind in KINDS if routed or not kind.routed_only]
    (kind,) = rng.choices(kinds, [kind.weight for kind in kinds])
    return kind, kind.make(rng)
