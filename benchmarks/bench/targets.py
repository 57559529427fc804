"""What results have to reach, printed beside them so that a regression shows."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Target:
    """One bound and the median that is held against it."""

    what: str
    measured: float
    sense: Literal["at least", "at most"]
    bound: float

    @property
    def met(self) -> bool:
        if self.sense == "at least":
            return self.measured >= self.bound
        return self.measured <= self.bound

    def as_row(self) -> dict:
        return asdict(self) | {"met": self.met}


# Share of the theoretical speed-up that prefill reaches, by average visual tokens of 576.
PREFILL_SHARE = {192: 0.92, 128: 0.92, 64: 0.85}
# Reroute's time over remove's at the same average.
REROUTE_OVER_REMOVE = 1.05
# Routing that saves nothing, against stock.
MACHINERY_PREFILL = 0.98
MACHINERY_DECODE = 1.03
MACHINERY_GROUPS = 12
TEXT_ONLY = 0.99
# A step of a thin model over stock's, with up to five stages and with more; one image's prefill.
HOST_STEP_FEW = 1.02
HOST_STEP_MANY = 1.05
HOST_PREFILL = 1.05
# Requests per second, routed over dense, at every concurrency.
SERVING = 1.0
CAPACITY = 0.95
# Times to first token over stock's with its prefix cache, by traffic and engine.
REUSE = {
    ("chat", "pdrop reroute 192"): 1.75,
    ("chat", "pdrop reroute 64"): 1.05,
    ("system", "pdrop reroute 192"): 0.45,
    ("system", "pdrop reroute 64"): 0.30,
    ("again", "pdrop reroute 192"): 6.0,
    ("again", "pdrop reroute 64"): 2.6,
}
# Five turns of a conversation that keeps its choice, over stock.
KEPT_CHAT = {"192, keep": 0.60, "64, keep": 0.48}
# Between two tokens of requests that decode beside a prompt longer than a step, over stock.
BESIDE_LONG_PROMPT = 1.0
# Compiled routed engine's speed over the eager one's.
COMPILED_OVER_EAGER = 1.0


def at_least(what: str, measured: float, bound: float) -> dict:
    return Target(what=what, measured=measured, sense="at least", bound=bound).as_row()


def at_most(what: str, measured: float, bound: float) -> dict:
    return Target(what=what, measured=measured, sense="at most", bound=bound).as_row()


def table(targets: Iterable[dict]) -> Iterator[str]:
    """A Markdown table of targets' rows."""
    yield "| target | measured | bound | |"
    yield "|---|---|---|---|"
    for row in targets:
        verdict = "met" if row["met"] else "**missed**"
        yield f"| {row['what']} | {row['measured']:.3f} | {row['sense']} {row['bound']:g} | {verdict} |"
