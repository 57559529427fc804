"""Runs tests in a copy of the repository that may be spoilt."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]
_LEFT_OUT = (".*", "__pycache__", "build", "dist", "*.egg-info")


class Copy:
    """A copy of the working tree, without environments, caches and version control."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))

    @contextmanager
    def spoilt(self, mutant: Mutant) -> Iterator[None]:
        """While entered, the copy has the mutant's change."""
        path = self.folder / mutant.file
        whole = path.read_text(encoding="utf-8")
        path.write_text(mutant.applied(self.folder), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(whole, encoding="utf-8")

    def passes(self, tests: Sequence[str], limit: float) -> tuple[bool, str]:
        """Whether tests pass within `limit` seconds, and what pytest printed.

        Raises RuntimeError where they cannot be judged: none found, or not importable.
        """
        words = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--color=no", *tests]
        # A mutant may be as long as what it replaces, and as new: no compiled file may stand for it.
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        running = subprocess.Popen(
            [sys.executable, "-m", "pytest", *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = running.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            printed, _ = running.communicate()
            return False, f"{printed}\nnot done after {limit:g} s"
        if running.returncode not in (0, 1):
            raise RuntimeError(f"pytest cannot run {' '.join(tests)}:\n{printed[-4000:]}")
        return running.returncode == 0, printed
