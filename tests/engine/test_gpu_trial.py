"""The GPU suite's steps run on CPU; their numbers are not looked at."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a trial is for CPUs")
def test_trial(tmp_path: Path) -> None:
    """The tables' kernel step, and a routed engine driven from inside."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--trial", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", "kernels", "speed-pdrop-64"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: record["passed"] for name, record in records.items()} == {
        "kernels": True,
        "speed-pdrop-64": True,
    }
    assert records["speed-pdrop-64"]["requests_per_s_8"] > 0
    assert "numbers mean nothing" in (tmp_path / "gpu.md").read_text()
