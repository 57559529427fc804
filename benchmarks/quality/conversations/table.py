"""Outcomes of all servers, scored by turn and by how a turn follows: what the report shows, in JSON's types."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.grounding.conversations import OTHER, TURN_KINDS
from benchmarks.quality.conversations.gap import Gap
from benchmarks.quality.conversations.rows import COMPARISONS, GAP, KEEP, METHODS, RERANK
from benchmarks.quality.conversations.talking import TalkTurn
from benchmarks.quality.outcomes import Outcome
from benchmarks.quality.results import (
    SHARED,
    SHARED_OF_MODEL,
    Row,
    compared,
    pairs,
    ran,
    rows_in,
    scored,
)
from benchmarks.quality.scoring import Difference, Score

ALL, LATER = "all", "later turns"
# `keep` becomes the default if it loses less than so many points on questions about another thing, at these budgets.
MOST_LOST, DECIDING = 0.01, (0.33, 0.22)

Outcomes = Mapping[int, Outcome]


def table(folder: Path, turns: Sequence[TalkTurn], talks: int, not_run: Mapping[str, str]) -> dict:
    """folder: of outcomes. turns: of all conversations. not_run: server -> why it could not be asked."""
    digests = [turn.prompt.digest for turn in turns]
    order = list(METHODS)
    found = sorted(
        rows_in(folder, digests),
        key=lambda row: (-(row.about["budget"] or 1), order.index(row.about["method"])),
    )
    differences = list(_comparisons(found, turns))
    return {
        "model": {key: found[0].about[key] for key in SHARED_OF_MODEL} if found else None,
        "questions": {
            "conversations": talks,
            "count": len(turns),
            **({key: found[0].about[key] for key in SHARED} if found else {}),
        },
        "ran": ran(found),
        "complete": not not_run and all(row.status == "complete" for row in found),
        "rows": [_row(row, turns) for row in found],
        "not_run": dict(not_run),
        "comparisons": differences,
        "gaps": list(_gaps(found, turns)),
        "default": default(differences),
    }


def _row(row: Row, turns: Sequence[TalkTurn]) -> dict:
    keys = ("method", "budget", "average", "decision_layers", "kept", "arguments")
    return {
        "name": row.name,
        **{key: row.about[key] for key in keys},
        "share": row.about["average"] / row.about["visual_tokens"],
        "note": row.note,
        "status": row.status,
        **scored(row.score),
        "by_turn": {
            str(number): _score(row.outcomes, turns, lambda turn, n=number: turn.turn == n)
            for number in sorted({turn.turn for turn in turns})
        },
        "by_kind": {kind: _score(row.outcomes, turns, _of(kind)) for kind in TURN_KINDS},
    }


def _of(kind: str) -> Callable[[TalkTurn], bool]:
    if kind == ALL:
        return lambda turn: True
    if kind == LATER:
        return lambda turn: turn.turn > 1
    return lambda turn: turn.prompt.kind == kind


def _score(outcomes: Outcomes, turns: Iterable[TalkTurn], wanted: Callable) -> dict:
    return scored(Score.of(_those(outcomes, turns, wanted).values()))


def _those(outcomes: Outcomes, turns: Iterable[TalkTurn], wanted: Callable) -> dict[int, Outcome]:
    numbers = (turn.prompt.index for turn in turns if wanted(turn))
    return {number: outcomes[number] for number in numbers if number in outcomes}


def _comparisons(rows: Sequence[Row], turns: Sequence[TalkTurn]) -> Iterator[dict]:
    """Of both servers' answers to the same questions, each behind its own earlier answers."""
    for pair in pairs(rows, COMPARISONS):
        for kind in (ALL, LATER, *TURN_KINDS):
            one, other = (_those(row.outcomes, turns, _of(kind)) for row in pair)
            difference = Difference.between(one, other)
            if difference.pairs:
                yield compared(*pair, {"kind": kind}, difference)


def _gaps(rows: Sequence[Row], turns: Sequence[TalkTurn]) -> Iterator[dict]:
    """Of later turns, together and by kind: first ones are the same for all."""
    at = {(row.about["budget"], row.about["method"]): row for row in rows}
    for budget in dict.fromkeys(budget for budget, _ in at):
        three = [at.get((budget, method)) for method in GAP]
        for kind in (LATER, *TURN_KINDS[1:]):
            gap = Gap.between(
                *(_those(row.outcomes if row else {}, turns, _of(kind)) for row in three)
            )
            if gap.questions:
                yield {
                    "budget": budget,
                    "kind": kind,
                    "questions": gap.questions,
                    "share": gap.share,
                    "interval": gap.interval,
                }


def default(compared: Iterable[Mapping]) -> str | None:
    """Which history these figures make the default; None where a budget that decides is missing."""
    lost = {
        each["budget"]: each["difference"]
        for each in compared
        if (each["first"], each["second"], each["kind"]) == (RERANK, KEEP, OTHER)
    }
    if not all(budget in lost for budget in DECIDING):
        return None
    return "keep" if all(lost[budget] < MOST_LOST for budget in DECIDING) else "rerank"
