"""The command line of the quality harness, asking a server that is running already."""

import json

import pytest

from benchmarks.quality.__main__ import measure, parse_arguments
from tests.unit.quality_stub import Reply, stub

WORDS = ["--questions", "12", "--model", "stub", "--label", "my own", "--visual-tokens", "40"]


def test_failed_requests_leave_it_incomplete_until_a_rerun(tmp_path):
    out = ["--out", str(tmp_path)]
    with stub(lambda text: Reply(status=503 if "label" in text else 200)) as server:
        assert not measure(parse_arguments(["--base-url", server.url, *WORDS, *out]))
        (row,) = json.loads((tmp_path / "quality.json").read_text())["configurations"]
        failed = row["failed"]
        assert 0 < failed < 12 and row["answered"] == 12 - failed
        server.reply_to = lambda _: Reply()
        assert measure(parse_arguments(["--base-url", server.url, *WORDS, *out]))
        assert len(server.asked) == 12 + failed
        assert all("label" in text for text in server.asked[12:])
        (row,) = json.loads((tmp_path / "quality.json").read_text())["configurations"]
        assert (row["failed"], row["answered"], row["average"]) == (0, 12, 40)
        # Starting anew asks everything again.
        assert measure(parse_arguments(["--base-url", server.url, *WORDS, *out, "--fresh"]))
        assert len(server.asked) == 24 + failed


def test_two_servers_are_two_rows(tmp_path):
    with stub(lambda _: Reply()) as server:
        for label in ("one", "two"):
            words = ["--questions", "3", "--model", "stub", "--label", label]
            measure(parse_arguments(["--base-url", server.url, *words, "--out", str(tmp_path)]))
    rows = json.loads((tmp_path / "quality.json").read_text())["configurations"]
    assert [row["method"] for row in rows] == ["one", "two"]


def test_publishing_asks_nothing_and_writes_the_same_report(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.quality.__main__.PUBLISHED", tmp_path / "published")
    out = ["--out", str(tmp_path)]
    with stub(lambda _: Reply()) as server:
        assert measure(parse_arguments(["--base-url", server.url, *WORDS, *out]))
    assert measure(parse_arguments(["--publish", "--questions", "12", "--only", "dense", *out]))
    for name in ("quality.json", "quality.md"):
        published = (tmp_path / "published" / name).read_text()
        assert published == (tmp_path / name).read_text()
        assert str(tmp_path) not in published


@pytest.mark.parametrize(
    "words",
    [
        ["--label", "x"],
        ["--visual-tokens", "4"],
        ["--base-url", "http://127.0.0.1:9/v1"],
        ["--base-url", "http://127.0.0.1:9/v1", "--model", "x"],
        ["--questions", "0"],
        ["--concurrency", "0"],
        ["--publish", "--quick"],
    ],
)
def test_arguments_that_make_no_sense_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(words)
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json.*benchmarks.grounding.train"):
        measure(parse_arguments(["--model", str(tmp_path), "--out", str(tmp_path / "out")]))


def test_quick_means_few_questions():
    assert parse_arguments(["--quick"]).questions < 50
    assert parse_arguments([]).questions == 1000
