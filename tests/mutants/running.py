"""Runs tests in a copy of the repository that may be spoilt."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]
_LEFT_OUT = (".*", "__pycache__", "build", "dist", "*.egg-info")
_PYTEST = ("-x", "-q", "--no-header", "-p", "no:cacheprovider", "--color=no")


class Copy:
    """A copy of the working tree, without environments, caches and version control.

    Entered, it has a process that runs tests in it (`warm.py`): importing vLLM takes longer than most
    of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))

    def __enter__(self) -> Copy:
        # A mutant may be as long as what it replaces, and as new: no compiled file may stand for it.
        own = {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        self._warm = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.warm"],
            cwd=self.folder,
            env={**os.environ, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *exception: Any) -> None:
        self._warm.communicate()

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
        path = self.folder / "printed.txt"
        asked = [[*_PYTEST, *tests], str(path), limit]
        print(json.dumps(asked), file=self._warm.stdin, flush=True)
        answer = self._warm.stdout.readline()
        if not answer:
            raise RuntimeError("The process that runs the tests has ended.")
        code, printed = json.loads(answer), path.read_text(encoding="utf-8", errors="replace")
        if code is None:
            return False, f"{printed}\nnot done after {limit:g} s"
        if code not in (0, 1):
            raise RuntimeError(f"pytest cannot run {' '.join(tests)}:\n{printed[-4000:]}")
        return code == 0, printed
