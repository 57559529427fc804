"""A process that has imported what tests need, all but this package, and forks to run pytest.

`python -m tests.mutants.warm` in the folder whose tests are run. Each line it reads is a JSON list: words
for pytest, a file for what pytest prints, and a limit in seconds. Each line it writes is pytest's
exit status, or null where it was not done in time.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from typing import NoReturn

import pytest

HEAVY = (
    "hypothesis.stateful",
    "matplotlib.figure",
    "torch",
    "torch._subclasses.fake_tensor",
    "transformers",
    "vllm.engine.arg_utils",
    "vllm.entrypoints.llm",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.worker.gpu.model_states.default",
)


def main() -> None:
    # What libraries print while they are imported, and after, is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in HEAVY:
        importlib.import_module(name)
    assert "vllm_reroute" not in sys.modules, "children would not see it changed"
    for line in sys.stdin:
        words, path, limit = json.loads(line)
        child = os.fork()
        if not child:
            run(words, path)
        print(json.dumps(status(child, limit)), file=answers, flush=True)


def run(words: list[str], path: str) -> NoReturn:
    """Ends the process with pytest's exit status."""
    os.setsid()
    printed = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    code = 3
    try:
        code = int(pytest.main(words))
    finally:
        sys.stdout.flush()
        os._exit(code)


def status(child: int, limit: float) -> int | None:
    """Waits for a child; ends it and what it has started where that takes longer than `limit` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    main()
