"""Outcomes of all configurations, scored: what the report shows, in JSON's types."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.layer_choice import squares
from benchmarks.quality.looks import looks
from benchmarks.quality.methods import COMPARISONS, METHODS
from benchmarks.quality.outcomes import (
    Outcome,
    Recorded,
    check_identity,
    check_questions,
    read,
)
from benchmarks.quality.scoring import Difference, Score

# Identities agree on these, or their outcomes do not belong into one table.
SHARED = ("split", "max_tokens", "temperature")
SHARED_OF_MODEL = ("model", "model_name", "visual_tokens", "decoder_layers", "dtype")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration's outcomes for the questions of the report.

    about: its identity. note: how it came about. missing: questions not asked yet.
    """

    name: str
    about: Mapping
    note: str
    runs: Sequence[Mapping]
    outcomes: Mapping[int, Outcome]
    missing: int

    @property
    def score(self) -> Score:
        return Score.of(self.outcomes.values())

    @property
    def by_kind(self) -> dict[str, Score]:
        kinds = dict.fromkeys(outcome.kind for _, outcome in sorted(self.outcomes.items()))
        return {
            kind: Score.of(o for o in self.outcomes.values() if o.kind == kind) for kind in kinds
        }

    @property
    def status(self) -> str:
        """`complete`, or what is left to do."""
        left = [
            f"{count} {what}"
            for count, what in ((self.score.failed, "failed"), (self.missing, "not asked"))
            if count
        ]
        return f"incomplete: {', '.join(left)}" if left else "complete"


def check_folder(folder: Path, about: Mapping, digests: Sequence[str]) -> None:
    """Raises ValueError if outcomes of `about` could not share a table with those already in the folder."""
    for path in sorted(folder.glob("*.jsonl")):
        recorded = read(path)
        check_questions(path, recorded.outcomes, digests)
        ours = about["model"] is not None and recorded.identity["model"] is not None
        keys = SHARED + SHARED_OF_MODEL * ours
        check_identity(
            path, {key: recorded.identity[key] for key in keys}, {key: about[key] for key in keys}
        )


def rows_in(folder: Path, digests: Sequence[str]) -> list[Row]:
    """A row for every file of outcomes, in the order of the table of methods.

    digests: of the questions the report is about. Raises ValueError if files do not belong together.
    """
    found = {path: read(path) for path in sorted(folder.glob("*.jsonl"))}
    identities = sorted((each.identity for each in found.values()), key=lambda i: not i["model"])
    for about in identities[:1]:
        check_folder(folder, about, digests)
    rows = [_row(path.stem, recorded, len(digests)) for path, recorded in found.items()]
    order = list(METHODS)

    def place(row: Row) -> tuple:
        method = row.about["method"]
        place = order.index(method) if row.about["model"] and method in order else len(order)
        return place, -(row.about["budget"] or 1), row.name

    return sorted(rows, key=place)


def _row(name: str, recorded: Recorded, count: int) -> Row:
    outcomes = {index: each for index, each in recorded.outcomes.items() if index < count}
    return Row(
        name=name,
        about=recorded.identity,
        note=recorded.runs[-1]["note"] if recorded.runs else "",
        runs=recorded.runs,
        outcomes=outcomes,
        missing=count - len(outcomes),
    )


def results(rows: Sequence[Row], digests: Sequence[str], not_run: Mapping[str, str]) -> dict:
    """Everything the report shows. not_run: configuration -> why it could not be asked."""
    ours = [row for row in rows if row.about["model"] is not None]
    return {
        "model": {key: ours[0].about[key] for key in SHARED_OF_MODEL} if ours else None,
        "questions": {
            "count": len(digests),
            **({k: rows[0].about[k] for k in SHARED} if rows else {}),
        },
        "ran": ran(rows),
        "complete": not not_run and all(row.status == "complete" for row in rows),
        "configurations": [_configuration(row) for row in rows],
        "not_run": dict(not_run),
        "comparisons": list(_comparisons(rows)),
        **_tables(rows),
    }


def _tables(rows: Sequence[Row]) -> dict[str, list[dict]]:
    outcomes = {(row.about["method"], row.about["budget"]): row.outcomes for row in rows}
    budgets = sorted({budget for _, budget in outcomes if budget is not None}, reverse=True)
    return {"squares": squares(outcomes, budgets), "looks": looks(outcomes, budgets)}


def ran(rows: Sequence[Row]) -> dict[str, list[str]]:
    """What outcomes were made with and when: every value that occurs, oldest first."""
    runs = sorted((run for row in rows for run in row.runs), key=lambda run: run["date"])
    keys = dict.fromkeys(key for run in runs for key in run if key != "note")
    return {key: list(dict.fromkeys(run[key] for run in runs if key in run)) for key in keys}


def _configuration(row: Row) -> dict:
    visual, average = row.about["visual_tokens"], row.about["average"]
    keys = ("method", "budget", "average", "decision_layers", "kept", "arguments")
    return {
        "name": row.name,
        **{key: row.about[key] for key in keys},
        "share": average / visual if visual and average is not None else None,
        "note": row.note,
        "status": row.status,
        "not_asked": row.missing,
        **scored(row.score),
        "by_kind": {kind: scored(score) for kind, score in row.by_kind.items()},
    }


def scored(score: Score) -> dict:
    return {
        "correct": score.correct,
        "answered": score.answered,
        "failed": score.failed,
        "accuracy": score.accuracy,
        "interval": score.interval,
    }


def _comparisons(rows: Sequence[Row]) -> Iterator[dict]:
    for one, other in pairs(rows, COMPARISONS):
        averages = [one.about["average"], other.about["average"]]
        difference = Difference.between(one.outcomes, other.outcomes)
        if difference.pairs:
            yield compared(one, other, {"averages": averages}, difference)


def pairs(rows: Sequence[Row], wanted: Iterable[tuple[str, str]]) -> Iterator[tuple[Row, Row]]:
    """Rows of equal budgets whose methods are to be set against each other."""
    at = {(row.about["method"], row.about["budget"]): row for row in rows}
    for first, second in wanted:
        for method, budget in at:
            if method == first and (second, budget) in at:
                yield at[first, budget], at[second, budget]


def compared(one: Row, other: Row, about: Mapping, difference: Difference) -> dict:
    """Two rows set against each other, for the report. about: what else is to be said of them."""
    return {
        "first": one.about["method"],
        "second": other.about["method"],
        "budget": one.about["budget"],
        **about,
        "pairs": difference.pairs,
        "only_first": difference.only_first,
        "only_second": difference.only_second,
        "difference": difference.value,
        "interval": difference.interval,
        "p_value": difference.p_value,
        "complete": one.status == other.status == "complete",
    }
