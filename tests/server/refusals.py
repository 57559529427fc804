"""What a routed server must refuse, in whatever process it is asked."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from typing import Any

from benchmarks.photos import PHOTOS

MODEL_NAME = "tiny"
STEP_TOKENS = 600
TIMEOUT_S = 120
# Nothing after the image, and no generation prompt. What stands for it, in LLaVA and in Qwen-VL, whose tokenizer has no
# first token.
IMAGE_ONLY_TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "{{ '<image>' if bos_token else '<|vision_start|><|image_pad|>' }}"
    "{% endif %}{% endfor %}{% endfor %}"
)
_NUMBERS = count()


def new_picture() -> str:
    """A data URL that no other request of this process has sent."""
    shift = 3 * next(_NUMBERS)
    buffer = BytesIO()
    PHOTOS[0].image.crop((shift, 0, 200 + shift, 200)).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def chat(picture: str, **options: Any) -> dict[str, Any]:
    """The body of a chat completion about one picture."""
    part = {"type": "image_url", "image_url": {"url": picture}}
    content = [part, {"type": "text", "text": "What is shown?"}]
    messages = [{"role": "user", "content": content}]
    return {"model": MODEL_NAME, "max_tokens": 4, "messages": messages, **options}


def responses(picture: str, **options: Any) -> dict[str, Any]:
    """The same for /v1/responses."""
    part = {"type": "input_image", "image_url": picture, "detail": "auto"}
    content = [part, {"type": "input_text", "text": "What is shown?"}]
    turns = [{"role": "user", "content": content}]
    return {"model": MODEL_NAME, "max_output_tokens": 4, "input": turns, **options}


def messages(picture: str, **options: Any) -> dict[str, Any]:
    """The same for /v1/messages."""
    data = picture.partition(",")[2]
    source = {"type": "base64", "media_type": "image/png", "data": data}
    content = [{"type": "image", "source": source}]
    turns = [{"role": "user", "content": [*content, {"type": "text", "text": "What is shown?"}]}]
    return {"model": MODEL_NAME, "max_tokens": 4, "messages": turns, **options}


def batch(picture: str, **options: Any) -> dict[str, Any]:
    """Two conversations about it, for /v1/chat/completions/batch."""
    body = chat(picture, **options)
    return body | {"messages": [body["messages"]] * 2}


CHAT = "/v1/chat/completions"
BATCH = f"{CHAT}/batch"
MAKERS = {
    CHAT: chat,
    "/v1/responses": responses,
    "/v1/messages": messages,
}
ENDS_WITH_IMAGE = {"add_generation_prompt": False, "chat_template": IMAGE_ONLY_TEMPLATE}


@dataclass(frozen=True)
class Refused:
    """One chat completion that is refused. cure: what the error must say."""

    options: dict[str, Any]
    cure: str
    streams: tuple[bool, ...] = (False, True)

    def body(self, picture: str, stream: bool) -> dict[str, Any]:
        return chat(picture, stream=stream, **self.options)


REFUSED = {
    # vLLM itself refuses to stream these.
    "prompt-logprobs": Refused(
        {"prompt_logprobs": 1}, "Leave prompt_logprobs out", streams=(False,)
    ),
    "echo": Refused({"echo": True}, "Leave echo out"),
    "beam-search": Refused({"use_beam_search": True, "n": 2}, "Leave use_beam_search out"),
    "ends-with-image": Refused(ENDS_WITH_IMAGE, "Put the question after the image"),
}
SERVER_WORDS = [
    *("--reroute-schedule", "pdrop", "--reroute-tier", "128", "--dtype", "float32"),
    *("--max-model-len", "1024", "--max-num-batched-tokens", str(STEP_TOKENS)),
    *("--kv-cache-memory-bytes", str(64 * 2**20), "--limit-mm-per-prompt", '{"image": 12}'),
    *("--served-model-name", MODEL_NAME, "--enforce-eager"),
]
"""Of a server that refuses all of them; `--trust-request-chat-template` besides, over HTTP."""


def post(url: str, body: dict[str, Any], **headers: str) -> tuple[int, str]:
    """Status and text of the answer, a stream's to its end."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


SOME = ("echo", "ends-with-image")
"""One that the request says itself, and one that only its prompt shows."""


def cases(names: Iterable[str] = tuple(REFUSED)) -> Iterator[tuple[str, Refused, bool]]:
    """Those refusals, whole and streamed."""
    for name in names:
        refused = REFUSED[name]
        for stream in refused.streams:
            yield name, refused, stream


def check_refusals(url: str, names: Iterable[str], **headers: str) -> None:
    """Each is refused before anything starts, and its picture is answered about afterwards."""
    for name, refused, stream in cases(names):
        picture = new_picture()
        status, text = post(url + CHAT, refused.body(picture, stream), **headers)
        assert (status, refused.cure in text) == (400, True), (name, stream, status, text)
        for path, make in MAKERS.items():
            status, text = post(url + path, make(picture), **headers)
            assert status == 200, (name, stream, path, text)
    picture = new_picture()
    status, text = post(url + BATCH, batch(picture, **ENDS_WITH_IMAGE), **headers)
    assert (status, REFUSED["ends-with-image"].cure in text) == (400, True), (status, text)
    status, text = post(url + BATCH, batch(picture), **headers)
    assert status == 200 and len(json.loads(text)["choices"]) == 2, (status, text)


def check_refusals_at_once(url: str) -> None:
    """Refused and good requests about one picture, side by side: the good ones are answered."""
    for name in ("prompt-logprobs", "ends-with-image"):
        picture = new_picture()
        bad, good = REFUSED[name].body(picture, False), chat(picture)
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda body: post(url + CHAT, body), [bad, good] * 6))
        assert [status for status, _ in answers] == [400, 200] * 6, (name, answers)
