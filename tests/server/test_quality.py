"""The quality harness from end to end: real servers, real requests, a report, and a rerun that asks nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.local_model import TINY, build_local_model
from benchmarks.quality.__main__ import measure, parse_arguments

REPOSITORY = Path(__file__).resolve().parents[2]
QUESTIONS = 9
# A server's warm-up and its answers take time by visual tokens: 64 of them.
SHAPE = replace(TINY, image_size=112)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return build_local_model(folder / "tiny-llava", SHAPE)


def words(model: Path, out: Path) -> list[str]:
    given = ["--model", str(model), "--out", str(out), "--questions", str(QUESTIONS)]
    return [*given, "--budgets", "33", "--only", "dense", "fastv remove"]


def test_a_run_reports_and_a_rerun_asks_nothing(folder: Path, model: Path) -> None:
    out = folder / "out"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.quality", *words(model, out)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "quality.json").read_text())
    dense, routed = found["configurations"]
    assert found["complete"] and found["questions"]["count"] == QUESTIONS
    assert (dense["name"], dense["average"]) == ("dense", SHAPE.visual_tokens)
    assert (routed["name"], routed["decision_layers"]) == ("fastv-remove-33", [1])
    assert routed["average"] < 0.4 * SHAPE.visual_tokens
    assert dense["answered"] == routed["answered"] == QUESTIONS
    assert "| fastv remove | 33 |" in done.stdout

    before = {
        path: path.stat().st_mtime_ns for path in (*out.glob("outcomes/*"), *out.glob("logs/*"))
    }
    assert len(before) == 4
    assert measure(parse_arguments(words(model, out)))
    assert {path: path.stat().st_mtime_ns for path in before} == before

    other = build_local_model(folder / "other", replace(SHAPE, seed=1))
    with pytest.raises(ValueError, match=r"model was .*--fresh"):
        measure(parse_arguments(words(other, out)))
