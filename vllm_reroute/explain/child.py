"""A process of its own for each engine: memory is given back before the next one starts."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

SECONDS_TO_STOP = 30


def in_child(environment: Mapping[str, str], function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a new process, under these environment variables besides our own.

    Function, arguments and result must pickle. A ValueError is raised here as it was there;
    anything else that ends the process is a RuntimeError.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, dict(environment), function, args))
    process.start()
    theirs.close()
    try:
        outcome, value = ours.recv()
        process.join(SECONDS_TO_STOP)
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the engine's process ended with code {process.exitcode} before it answered; what it "
            "printed says why"
        ) from None
    finally:
        # An interrupt must not leave an engine behind; for a process that has ended this is nothing.
        process.kill()
        process.join()
    if outcome == "answered":
        return value
    raise (ValueError if outcome == "refused" else RuntimeError)(value)


def _run(
    connection: Connection, environment: dict[str, str], function: Callable[..., Any], args: tuple
) -> None:
    os.environ.update(environment)
    try:
        outcome = ("answered", function(*args))
    except ValueError as error:
        outcome = ("refused", str(error))
    except Exception as error:
        traceback.print_exc()
        outcome = ("failed", f"{type(error).__name__}: {error}")
    connection.send(outcome)
