"""The servers that are compared, and asking each of them what it has not answered yet."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.quality.conversations.talking import Talk, hold_all, turns_of
from benchmarks.quality.methods import DENSE, Configuration, configurations
from benchmarks.quality.model_shape import ModelShape
from benchmarks.quality.run import Record, run_rows
from benchmarks.quality.serving import Serving

RERANK, KEEP, RECALL = "reroute rerank", "reroute keep", "reroute recall"
REMOVE = "remove keep"
# Method -> the single-question method it is, and further flags.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    DENSE: (DENSE, ()),
    RERANK: ("pdrop reroute", ("--reroute-history", "rerank")),
    KEEP: ("pdrop reroute", ("--reroute-history", "keep")),
    RECALL: ("pdrop reroute", ("--reroute-history", "recall")),
    REMOVE: ("pdrop remove", ("--reroute-history", "keep")),
}
# What is set against what at the same budget: the difference first - second is reported.
COMPARISONS = ((RERANK, KEEP), (RERANK, RECALL), (RECALL, KEEP), (KEEP, REMOVE))
# How much of what the last has over the first the one between has, at the same budget.
GAP = (KEEP, RECALL, RERANK)
# Of a conversation.
PICTURES = 2


def rows(
    methods: Sequence[str], budgets: Sequence[float], shape: ModelShape
) -> list[Configuration]:
    """Those methods at those budgets (shares in (0, 1)), budget after budget; stock vLLM once."""
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"--only {unknown[0]!r} is unknown. Choose of: {', '.join(METHODS)}.")
    found = []
    for name in dict.fromkeys(methods):
        single, flags = METHODS[name]
        for each in configurations([single], budgets, shape):
            found.append(replace(each, method=name, arguments=(*each.arguments, *flags)))
    return sorted(found, key=lambda each: -(each.budget or 1))


def run(
    wanted: Sequence[Configuration],
    talks: Sequence[Talk],
    serving: Serving,
    fingerprint: str,
    folder: Path,
) -> dict[str, str]:
    """Asks what is missing in `folder`; returns the rows that could not be asked, and why.

    A conversation that is not complete is held anew from its first turn: its later questions depend on all before.
    """
    prompts = [turn.prompt for turn in turns_of(talks)]

    def hold_missing(endpoint, missing: Sequence[int], concurrency: int, record: Record) -> None:
        open_ = set(missing)
        incomplete = [talk for talk in talks if any(turn.prompt.index in open_ for turn in talk)]
        hold_all(endpoint, incomplete, concurrency, record)

    return run_rows(wanted, prompts, hold_missing, serving, fingerprint, folder)
