"""What became of every question, in one file per configuration that a later run continues.

Lines of JSON: first what the outcomes depend on, then one line per run that added outcomes, then those outcomes. A
question may occur again after a failure; its last line counts.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One question's answer, or why there is none.

    index: the question's place in its split. digest: of its picture, text and right answer.
    answer: None if the request failed; error then says how.
    """

    index: int
    digest: str
    kind: str
    expected: str
    answer: str | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def failed(self) -> bool:
        return self.answer is None


@dataclass(frozen=True)
class Recorded:
    """What a file holds. identity: what its outcomes depend on. runs: what was running when, one entry per run."""

    identity: dict
    runs: list[dict]
    outcomes: dict[int, Outcome]


class OutcomeFile:
    """Outcomes of one configuration, kept at `path`.

    with OutcomeFile(path, identity, digests) as file:
        for index in file.missing(): ...
    """

    def __init__(self, path: Path, identity: dict, digests: Sequence[str]) -> None:
        """identity: everything the outcomes depend on but the questions, in JSON's types. digests: of the questions.

        Raises ValueError if the file's outcomes were made with anything else.
        """
        self.path, self.identity, self.digests = path, identity, digests
        self.outcomes: dict[int, Outcome] = {}
        if path.exists():
            recorded = read(path)
            check_identity(path, recorded.identity, identity)
            check_questions(path, recorded.outcomes, digests)
            self.outcomes = recorded.outcomes

    def missing(self) -> list[int]:
        """Questions that have no answer: not asked yet, or failed."""
        return [
            index
            for index in range(len(self.digests))
            if index not in self.outcomes or self.outcomes[index].failed
        ]

    def start_run(self, run: dict) -> None:
        """Notes that a run adds outcomes from here on. run: versions, commit, machine, date."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _cut_half_line(self.path)
        else:
            self._append({"identity": self.identity})
        self._append({"run": run})

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.index] = outcome
        self._append(asdict(outcome))

    def _append(self, entry: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read(path: Path) -> Recorded:
    """The file's contents. A last line without its end, from a run that was killed, does not count."""
    entries = list(_entries(path))
    if not entries or "identity" not in entries[0]:
        raise ValueError(f"{path} holds no outcomes. Remove it, or start anew with --fresh.")
    runs, outcomes = [], {}
    for entry in entries[1:]:
        if "run" in entry:
            runs.append(entry["run"])
        else:
            outcomes[entry["index"]] = Outcome(**entry)
    return Recorded(identity=entries[0]["identity"], runs=runs, outcomes=outcomes)


def check_identity(path: Path, recorded: dict, wanted: dict) -> None:
    """Raises ValueError, naming what differs, unless both are equal."""
    different = sorted(
        key for key in recorded.keys() | wanted.keys() if recorded.get(key) != wanted.get(key)
    )
    if different:
        shown = "; ".join(f"{k} was {recorded.get(k)!r}, is {wanted.get(k)!r}" for k in different)
        raise ValueError(
            f"{path} was recorded with something else: {shown}. Outcomes of both cannot be mixed. "
            "Name another folder with --out, or forget this one's outcomes with --fresh."
        )


def check_questions(path: Path, outcomes: dict[int, Outcome], digests: Sequence[str]) -> None:
    """Raises ValueError if a question that has an outcome is no longer the same."""
    for index, digest in enumerate(digests):
        if index in outcomes and outcomes[index].digest != digest:
            raise ValueError(
                f"{path} was recorded with other questions: number {index} has changed. Name "
                "another folder with --out, or forget this one's outcomes with --fresh."
            )


def _entries(path: Path) -> Iterator[dict]:
    text = path.read_text(encoding="utf-8")
    complete, _, _ = text.rpartition("\n")
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}, is not JSON ({error}). Remove that line, and its question "
                "is asked again; or start anew with --fresh."
            ) from error


def _cut_half_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
