"""Sends a storm and judges the server by what it said and what it holds."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

import httpx

from benchmarks.storm.kinds import Body, Kind, draw
from benchmarks.storm.server_state import memory_mib, when_idle

REQUEST_LIMIT_S = 300
IDLE_LIMIT_S = 60
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Allocators, thread stacks and picture caches fill up first: memory is judged by the last third.
JUDGED_FROM_REQUESTS = 1000
GROWTH_ALLOWED_MIB = 48
REFERENCE: Body = {"messages": [{"role": "user", "content": "Name a season."}], "max_tokens": 16}


@dataclass(frozen=True, kw_only=True)
class Storm:
    """url: of a server on this machine. pid: its first process, for memory; None leaves it out.

    routed: whether the server routes. at_once: requests under way at any time.
    """

    url: str
    requests: int
    at_once: int = 16
    seed: int = 0
    routed: bool = True
    pid: int | None = None

    def __post_init__(self) -> None:
        host = urlsplit(self.url).hostname
        if host not in LOOPBACK:
            raise ValueError(
                f"--url {self.url!r} is not on this machine. Allowed: {', '.join(LOOPBACK)}. Run the "
                "storm beside the server, or reach it through a tunnel."
            )
        if self.requests < 1 or self.at_once < 1:
            raise ValueError(
                f"--requests {self.requests} and --at-once {self.at_once}: both must be 1 or more."
            )


@dataclass
class Outcome:
    """counts: "kind: what happened" -> how often. problems: what must not be; empty is good."""

    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    state: dict[str, float] = field(default_factory=dict)
    memory_mib: list[float] = field(default_factory=list)

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


async def run(storm: Storm) -> Outcome:
    """Send all requests, wait until the server is idle, and judge."""
    outcome, started = Outcome(), time.monotonic()
    # A connection each: one kept alive may be closed by the server just when it is used again.
    limits = httpx.Limits(max_connections=storm.at_once + 4, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=storm.url, timeout=REQUEST_LIMIT_S, limits=limits
    ) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        before = await _reference(client, model)
        for third in range(3):
            first, end = (storm.requests * part // 3 for part in (third, third + 1))
            numbers = range(first, end)
            await _send_all(client, model, storm, iter(numbers), outcome)
            state = await asyncio.to_thread(when_idle, storm.url, IDLE_LIMIT_S)
            if storm.pid is not None:
                outcome.memory_mib.append(memory_mib(storm.pid))
        outcome.seconds = time.monotonic() - started
        outcome.state = state.as_dict()
        if not state.idle:
            outcome.problems.append(f"{IDLE_LIMIT_S} s after the last answer: {state}")
        if (after := await _reference(client, model)) != before:
            outcome.problems.append(f"the same question was answered {before!r}, then {after!r}")
    _judge_memory(outcome)
    return outcome


async def _reference(client: httpx.AsyncClient, model: str) -> str:
    """The answer to a question that is always the same, alone."""
    reply = await client.post(
        "/v1/chat/completions", json={**REFERENCE, "model": model, "temperature": 0}
    )
    return reply.raise_for_status().json()["choices"][0]["message"]["content"]


async def _send_all(client, model, storm: Storm, numbers, outcome: Outcome) -> None:
    async def worker() -> None:
        for number in numbers:
            kind, body = draw(storm.seed, number, routed=storm.routed)
            said = await _send(client, kind, {"temperature": 0, **body, "model": model}, number)
            outcome.counts[f"{kind.name}: {said}"] += 1
            if said not in ("left", str(kind.status)):
                outcome.problems.append(f"request {number}, {kind.name}: {said}")

    await asyncio.gather(*(worker() for _ in range(storm.at_once)))


async def _send(client: httpx.AsyncClient, kind: Kind, body: Body, number: int) -> str:
    """The status, "left" where the client did, or what went wrong in a stream or connection."""
    patience = random.Random(number).uniform(0.0, 0.6) if kind.cut else REQUEST_LIMIT_S
    try:
        async with asyncio.timeout(patience):
            return await _read(client, body)
    except TimeoutError:
        return "left" if kind.cut else f"no answer in {REQUEST_LIMIT_S} s"
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"


async def _read(client: httpx.AsyncClient, body: Body) -> str:
    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        text = (await reply.aread()).decode()
    if reply.status_code == 200 and body.get("stream"):
        if '"error"' in text:
            return f"200, then {text[:300]}"
        if not text.rstrip().endswith("data: [DONE]"):
            return f"200, then a stream without an end: {text[-200:]}"
    known = reply.status_code in (200, 400)
    return str(reply.status_code) if known else f"{reply.status_code}: {text[:300]}"


def _judge_memory(outcome: Outcome) -> None:
    if not outcome.memory_mib or sum(outcome.counts.values()) < JUDGED_FROM_REQUESTS:
        return
    *_, before, end = outcome.memory_mib
    if end - before > GROWTH_ALLOWED_MIB:
        outcome.problems.append(f"memory grew from {before:.0f} to {end:.0f} MiB in the last third")
