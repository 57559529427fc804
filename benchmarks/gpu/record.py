"""What a step has found: on disk after every measurement, so that one cut off keeps what it reached."""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Record:
    """One step's results. passed: whether everything it checks was right; None until it says so."""

    def __init__(self, path: Path, step: str, *, trial: bool) -> None:
        self.path, self._started = path, time.perf_counter()
        self.values: dict[str, Any] = {"step": step, "trial": trial, "passed": None}
        self._save()

    def put(self, **values: Any) -> None:
        """Add what was found."""
        self.values.update(values)
        self.values["seconds"] = round(time.perf_counter() - self._started, 1)
        self._save()
        for name, value in values.items():
            print(f"{name} = {json.dumps(value, default=str)[:400]}", flush=True)

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.values, indent=1, default=str), encoding="utf-8")
        new.replace(self.path)


def run_step(parser: argparse.ArgumentParser, step: Callable[[argparse.Namespace, Record], None]):
    """The `main` of a step's module: parse, run, and record how it went.

    `step` puts `passed` itself; an exception is recorded, and ends the process with status 1.
    """
    parser.add_argument("--record", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--name", required=True, help="the step's name in the report")
    parser.add_argument("--trial", action="store_true", help="tiny, on CPU: numbers mean nothing")
    args = parser.parse_args()
    record = Record(args.record, args.name, trial=args.trial)
    try:
        step(args, record)
    except Exception:
        record.put(passed=False, error=traceback.format_exc()[-3000:])
        sys.exit(1)
    sys.exit(0 if record.values["passed"] else 1)
