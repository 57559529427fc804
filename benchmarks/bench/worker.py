"""A process that keeps something built, an engine for instance, and runs functions on it when asked."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

STOP_LIMIT_S = 30


class Worker:
    """Started for a `with` block. Between calls it waits in the kernel and takes no processor time.

    with Worker("stock", folder / "logs") as worker:
        worker.call(build_engine, {...})
    """

    def __init__(self, name: str, logs: Path, limit_s: float = 1800) -> None:
        self.name = name
        self.log = logs / f"{name.replace(' ', '-')}.log"
        self.limit_s = limit_s

    def __enter__(self) -> "Worker":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(self.log)))
        self._process.start()
        theirs.close()
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # It has ended already.
            self._connection.send(None)
        self._process.join(STOP_LIMIT_S if exception[0] is None else 1)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(state, *args)` over there; state is a dictionary that stays. Errors come back."""
        self._connection.send((function, args))
        if not self._connection.poll(self.limit_s):
            raise RuntimeError(
                f"{self.name} did not answer within {self.limit_s:.0f} s. See {self.log}."
            )
        try:
            failed, result = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} ended without an answer. See {self.log}.") from None
        if failed:
            raise RuntimeError(f"{self.name}: {result} See {self.log}.")
        return result


def _serve(connection: Any, log: str) -> None:
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    state: dict[str, Any] = {}
    while (asked := _received(connection)) is not None:
        function, args = asked
        try:
            connection.send((False, function(state, *args)))
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            connection.send((True, f"{type(error).__name__}: {error}"))
    sys.stderr.flush()


def _received(connection: Any) -> Any:
    """None once there is nobody left to ask."""
    try:
        return connection.recv()
    except EOFError:
        return None
