"""The report of the quality harness: what it counts, admits and refuses."""

import json

import pytest

from benchmarks.quality import report
from benchmarks.quality.outcomes import Outcome, OutcomeFile
from benchmarks.quality.results import results, rows_in

KINDS = ("where", "count")
COUNT = 8
DIGESTS = [f"q{i}" for i in range(COUNT)]
RUN = {"date": "2026-01-01 10:00 UTC", "commit": "abc", "cpu": "a CPU", "note": "published"}


def identity(method: str, budget: float | None, average: float, **more) -> dict:
    return {
        "split": "test",
        "max_tokens": 8,
        "temperature": 0,
        "model": "0123456789abcdef",
        "model_name": "small",
        "visual_tokens": 144,
        "decoder_layers": 12,
        "dtype": "float32",
        "method": method,
        "budget": budget,
        "average": average,
        "decision_layers": [3],
        "kept": [144, 15],
        "arguments": [],
        **more,
    }


def record(folder, name: str, about: dict, answers: str, **run) -> None:
    """answers: a letter per question: r right, w wrong, f failed, - not asked."""
    file = OutcomeFile(folder / f"{name}.jsonl", about, DIGESTS)
    file.start_run(RUN | run)
    for index, letter in enumerate(answers):
        if letter != "-":
            file.add(
                Outcome(
                    index=index,
                    digest=DIGESTS[index],
                    kind=KINDS[index % 2],
                    expected="a1",
                    answer={"r": "A1.", "w": "b2", "f": None}[letter],
                    error="gone" if letter == "f" else None,
                )
            )


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "outcomes"
    record(folder, "fastv-reroute-33", identity("fastv reroute", 0.33, 47.25), "rrrrrrww")
    record(folder, "fastv-remove-33", identity("fastv remove", 0.33, 47.25), "rrwwrrwr")
    record(folder, "dense", identity("dense", None, 144.0), "rrrrrrrr", date="2026-01-02 09:00 UTC")
    return folder


def found(folder, count: int = COUNT, not_run: dict | None = None) -> dict:
    digests = DIGESTS[:count]
    return results(rows_in(folder, digests), digests, not_run or {})


def test_rows_are_in_the_tables_order_and_counted(folder):
    rows = found(folder)["configurations"]
    assert [row["name"] for row in rows] == ["dense", "fastv-remove-33", "fastv-reroute-33"]
    assert [(row["correct"], row["answered"]) for row in rows] == [(8, 8), (5, 8), (6, 8)]
    assert rows[1]["by_kind"]["count"]["correct"] == 3
    assert rows[1]["share"] == pytest.approx(47.25 / 144)
    assert found(folder)["complete"]


def test_comparison_is_paired(folder):
    (comparison,) = found(folder)["comparisons"]
    assert (comparison["first"], comparison["second"]) == ("fastv reroute", "fastv remove")
    assert (comparison["only_first"], comparison["only_second"]) == (2, 1)
    assert comparison["difference"] == pytest.approx(1 / 8)


def test_failures_and_gaps_make_it_incomplete_and_are_never_scored(folder):
    record(folder, "pdrop-remove-33", identity("pdrop remove", 0.33, 47.4), "rrff-w--")
    everything = found(folder)
    row = everything["configurations"][-1]
    assert (row["correct"], row["answered"], row["failed"]) == (2, 3, 2)
    assert row["status"] == "incomplete: 2 failed, 3 not asked"
    assert not everything["complete"]
    text = "\n".join(report.markdown(everything))
    assert "**Incomplete.**" in text and "incomplete: 2 failed, 3 not asked" in text
    assert "2 without an answer" in text


def test_a_configuration_that_could_not_run_makes_it_incomplete(folder):
    everything = found(folder, not_run={"random-33": "no such flag"})
    assert not everything["complete"]
    assert "`random-33` was not run: no such flag" in "\n".join(report.markdown(everything))


def test_fewer_questions_count_only_the_first(folder):
    rows = found(folder, count=4)["configurations"]
    assert [(row["correct"], row["answered"]) for row in rows] == [(4, 4), (2, 4), (4, 4)]


@pytest.mark.parametrize("change", [{"model": "other"}, {"dtype": "bfloat16"}, {"max_tokens": 99}])
def test_outcomes_that_do_not_belong_together_are_refused(folder, change):
    record(folder, "pdrop-remove-33", identity("pdrop remove", 0.33, 47.4, **change), "r")
    with pytest.raises(ValueError, match=rf"{next(iter(change))} was .*--fresh"):
        found(folder)


def test_a_server_of_ones_own_joins_the_table(folder):
    about = identity("my server", None, None, model=None, model_name="big", visual_tokens=None)
    record(folder, "own-my-server", about | {"decision_layers": [], "kept": []}, "wwwwwwww")
    everything = found(folder)
    assert everything["configurations"][-1]["method"] == "my server"
    assert everything["model"]["model_name"] == "small"
    assert "| my server | - | - | - | - | - | 0 / 8 |" in "\n".join(report.markdown(everything))


def test_every_commit_is_named(folder):
    later = {"date": "2026-01-02 10:00 UTC", "commit": "def"}
    record(folder, "dense", identity("dense", None, 144.0), "--------", **later)
    assert found(folder)["ran"]["commit"] == ["abc", "def"]
    text = "\n".join(report.markdown(found(folder)))
    assert "| commit | abc, def |" in text
    assert "2026-01-01 10:00 UTC to 2026-01-02 10:00 UTC" in text


def test_files_are_written_and_the_same_results_give_the_same(folder, tmp_path):
    everything = found(folder)
    first = {path.name: path.read_bytes() for path in report.write(everything, tmp_path / "one")}
    again = {path.name: path.read_bytes() for path in report.write(everything, tmp_path / "two")}
    assert first == again
    assert set(first) == {"quality.json", "quality.md", "quality.svg", "quality-by-kind.svg"}
    assert json.loads(first["quality.json"]) == json.loads(json.dumps(everything))


def test_no_outcomes_give_an_empty_report(tmp_path):
    everything = results(rows_in(tmp_path, DIGESTS), DIGESTS, {"dense": "did not start"})
    assert not everything["complete"]
    assert report.write(everything, tmp_path / "report")
