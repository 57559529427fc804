"""Outcome files of the quality harness: a run goes on where another stopped, or refuses."""

import pytest

from benchmarks.quality.outcomes import Outcome, OutcomeFile, read

IDENTITY = {"model": "m", "arguments": ["--reroute-schedule", "fastv"]}
DIGESTS = [f"q{i}" for i in range(4)]
RUN = {"date": "2026-01-01", "note": ""}


def outcome(index: int, answer: str | None = "yes", **more: str) -> Outcome:
    fields = {"digest": DIGESTS[index], "kind": "at", "expected": "yes", "answer": answer, **more}
    return Outcome(index=index, **fields)


def recorded(path, *outcomes: Outcome) -> OutcomeFile:
    file = OutcomeFile(path, IDENTITY, DIGESTS)
    file.start_run(RUN)
    for each in outcomes:
        file.add(each)
    return file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "outcomes" / "fastv.jsonl"


def test_a_new_file_misses_everything_and_is_not_made(path):
    assert OutcomeFile(path, IDENTITY, DIGESTS).missing() == [0, 1, 2, 3]
    assert not path.exists()


def test_a_rerun_asks_what_was_not_answered(path):
    recorded(path, outcome(2), outcome(0, None, error="timed out"))
    again = OutcomeFile(path, IDENTITY, DIGESTS)
    assert again.missing() == [0, 1, 3]
    again.start_run(RUN)
    again.add(outcome(0, "no"))
    assert OutcomeFile(path, IDENTITY, DIGESTS).missing() == [1, 3]
    found = read(path)
    assert found.outcomes[0].answer == "no" and not found.outcomes[0].failed
    assert len(found.runs) == 2 and found.identity == IDENTITY


def test_a_file_serves_fewer_and_more_questions(path):
    recorded(path, outcome(0), outcome(1))
    assert OutcomeFile(path, IDENTITY, DIGESTS[:2]).missing() == []
    assert OutcomeFile(path, IDENTITY, [*DIGESTS, "q4"]).missing() == [2, 3, 4]


@pytest.mark.parametrize("change", [{"model": "other"}, {"arguments": []}, {"dtype": "bfloat16"}])
def test_another_model_or_configuration_is_refused(path, change):
    recorded(path, outcome(0))
    with pytest.raises(ValueError, match=rf"{next(iter(change))} was .*--out.*--fresh"):
        OutcomeFile(path, IDENTITY | change, DIGESTS)


def test_changed_questions_are_refused(path):
    recorded(path, outcome(0), outcome(2))
    with pytest.raises(ValueError, match=r"number 2 has changed.*--fresh"):
        OutcomeFile(path, IDENTITY, ["q0", "other, but not asked yet", "other", "q3"])
    assert OutcomeFile(path, IDENTITY, ["q0", "not asked yet", "q2"]).missing() == [1]


def test_a_line_cut_off_by_a_kill_is_asked_again(path):
    recorded(path, outcome(0), outcome(1))
    path.write_bytes(path.read_bytes()[:-10])
    again = OutcomeFile(path, IDENTITY, DIGESTS)
    assert again.missing() == [1, 2, 3]
    again.start_run(RUN)
    again.add(outcome(1))
    assert sorted(read(path).outcomes) == [0, 1]


def test_a_broken_line_inside_is_an_error(path):
    recorded(path, outcome(0), outcome(1))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:20], *lines[3:]]) + "\n")
    with pytest.raises(ValueError, match="line 3"):
        read(path)
