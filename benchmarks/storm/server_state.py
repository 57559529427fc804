"""What a server holds: K/V, requests, memory of its processes."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import metrics_page

KIB = 1024


@dataclass(frozen=True)
class ServerState:
    """kv_use: share of the pool in use, 0 to 1, the largest of all engines. Others are counts."""

    running: float
    waiting: float
    kv_use: float
    preemptions: float

    @classmethod
    def of(cls, url: str) -> ServerState:
        """Read from /metrics."""
        page = metrics_page.fetch(url)

        def values(name: str) -> list[float]:
            return [sample.value for sample in metrics_page.of_metric(page, f"vllm:{name}")]

        return cls(
            running=sum(values("num_requests_running")),
            waiting=sum(values("num_requests_waiting")),
            kv_use=max(values("kv_cache_usage_perc")),
            preemptions=sum(values("num_preemptions_total")),
        )

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting or self.kv_use)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def when_idle(url: str, limit_s: float) -> ServerState:
    """The state once nothing is held, or after `limit_s` whatever is left."""
    deadline = time.monotonic() + limit_s
    while not (state := ServerState.of(url)).idle and time.monotonic() < deadline:
        time.sleep(0.5)
    return state


def memory_mib(pid: int) -> float:
    """Private memory of a process and all below it, MiB: what is shared counts by its share."""
    return sum(_pss(one) for one in _tree(pid))


def _pss(pid: int) -> float:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    (kib,) = re.findall(r"^Pss:\s+(\d+) kB$", rollup, flags=re.MULTILINE) or ("0",)
    return int(kib) * KIB / 2**20


def _tree(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = task.read_text(encoding="utf-8").split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += [one for child in below for one in _tree(int(child))]
    return found
