"""A stand-in for an OpenAI-compatible server on loopback that does to each question what a test says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUSY_S = 0.05


@dataclass(frozen=True)
class Reply:
    """content None: the message has no text. body: sent instead of a chat completion."""

    content: str | None = "yes"
    finish_reason: str = "stop"
    status: int = 200
    body: str | None = None
    wait_s: float = 0.0


@dataclass
class Stub:
    """asked: last texts of all requests so far, which are in `requests`. at_once: most requests under way at a time."""

    reply_to: Callable[[str], Reply]
    url: str = ""
    asked: list[str] = field(default_factory=list)
    requests: list[dict] = field(default_factory=list)
    at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def handle(self, request: dict) -> Reply:
        message = request["messages"][-1]
        text = " ".join(part["text"] for part in message["content"] if part["type"] == "text")
        with self._lock:
            self.asked.append(text)
            self.requests.append(request)
            self._now += 1
            self.at_once = max(self.at_once, self._now)
        reply = self.reply_to(text)
        time.sleep(BUSY_S + reply.wait_s)
        with self._lock:
            self._now -= 1
        return reply


@contextmanager
def stub(reply_to: Callable[[str], Reply]) -> Iterator[Stub]:
    """A running server; `reply_to` may be exchanged while it runs."""
    state = Stub(reply_to)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = state.handle(request)
            body = completion(reply) if reply.body is None else reply.body
            self.send_response(reply.status)
            self.send_header("Content-Type", "text/html" if reply.body else "application/json")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def completion(reply: Reply) -> str:
    message = {"role": "assistant", "content": reply.content}
    choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
    return json.dumps(
        {
            "id": "stub",
            "object": "chat.completion",
            "created": 0,
            "model": "stub",
            "choices": [choice],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
    )
