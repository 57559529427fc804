"""A short storm against a small K/V pool: everything answered as it must be, nothing kept."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from benchmarks.local_model import TINY, build_local_model
from benchmarks.local_server import LocalServer
from benchmarks.storm.kinds import KINDS, draw
from benchmarks.storm.run import Storm, run

REQUESTS = 240


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    model = build_local_model(
        tmp_path_factory.mktemp("storm") / "tiny-llava", replace(TINY, image_size=112)
    )
    flags = {
        "--reroute-schedule": "pdrop",
        "--reroute-tier": "128",
        "--dtype": "float32",
        "--max-model-len": "640",
        "--max-num-batched-tokens": "300",
        # Little more than one longest prompt, so that requests are preempted.
        "--kv-cache-memory-bytes": str(3 * 2**20),
        "--limit-mm-per-prompt": '{"image": 4}',
    }
    words = [word for pair in flags.items() for word in pair]
    with LocalServer("test-storm", model, [*words, "--enforce-eager"], start_limit_s=300) as server:
        yield server


def test_a_storm_leaves_nothing_behind(server: LocalServer) -> None:
    storm = Storm(url=server.url, requests=REQUESTS, at_once=24, pid=server.pid)
    outcome = asyncio.run(run(storm))
    assert outcome.problems == []
    assert sum(outcome.counts.values()) == REQUESTS
    assert outcome.state["kv_use"] == outcome.state["waiting"] == 0
    assert len(outcome.memory_mib) == 3 and min(outcome.memory_mib) > 100
    assert outcome.state["preemptions"] > 0, "the pool is not small enough to test anything"
    assert {name.split(":")[0] for name in outcome.counts} == {kind.name for kind in KINDS}


def test_a_storm_repeats_itself() -> None:
    """Seeded, so that what it found can be found again."""
    assert [draw(3, n, routed=True) for n in range(20)] == [
        draw(3, n, routed=True) for n in range(20)
    ]
    assert not any(draw(3, n, routed=False)[0].routed_only for n in range(200))


@pytest.mark.parametrize("url", ["http://192.168.0.7:8000", "http://example.org", "127.0.0.1"])
def test_only_this_machine_is_stormed(url: str) -> None:
    with pytest.raises(ValueError, match="not on this machine"):
        Storm(url=url, requests=1)
