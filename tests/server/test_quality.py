"""The quality harness from end to end: real servers, real requests, a report, and a rerun that asks nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.local_model import TINY, build_local_model

REPOSITORY = Path(__file__).resolve().parents[2]
QUESTIONS = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return build_local_model(folder / "tiny-llava", TINY)


def quality(model: Path, out: Path, *words: str) -> subprocess.CompletedProcess:
    program = [sys.executable, "-m", "benchmarks.quality", "--quick", "--out", str(out)]
    given = ["--model", str(model), "--questions", str(QUESTIONS), "--budgets", "33"]
    return subprocess.run(
        [*program, *given, *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_run_reports_and_a_rerun_asks_nothing(folder: Path, model: Path) -> None:
    out, only = folder / "out", ("--only", "dense", "fastv remove")
    done = quality(model, out, *only)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "quality.json").read_text())
    dense, routed = found["configurations"]
    assert found["complete"] and found["questions"]["count"] == QUESTIONS
    assert (dense["name"], dense["average"]) == ("dense", TINY.visual_tokens)
    assert (routed["name"], routed["decision_layers"]) == ("fastv-remove-33", [1])
    assert routed["average"] < 0.4 * TINY.visual_tokens
    assert dense["answered"] == routed["answered"] == QUESTIONS
    assert "| fastv remove | 33 |" in done.stdout
    outcomes = {path.name: path.read_bytes() for path in (out / "outcomes").iterdir()}

    started = time.monotonic()
    again = quality(model, out, *only)
    assert again.returncode == 0, again.stderr
    assert time.monotonic() - started < 60, "a rerun must not start servers"
    assert {path.name: path.read_bytes() for path in (out / "outcomes").iterdir()} == outcomes

    refused = quality(build_local_model(folder / "other", replace(TINY, seed=1)), out, *only)
    assert refused.returncode != 0 and "--fresh" in refused.stderr
    assert "model was" in refused.stderr
