"""How a command that measures for a long time ends."""

import signal
import sys
from collections.abc import Callable


def run_to_the_end(name: str, work: Callable[[], bool], *, started: str, again: str) -> None:
    """Runs `work` and exits with what a user has to know where it stops early.

    name: the command's. work: says whether it has everything; ValueError and OSError are the user's to read. started:
    what the command starts and stops, in one word. again: what the same command does next about what is missing.
    """
    # Unwinds, so that what was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        complete = work()
    except KeyboardInterrupt:
        sys.exit(f"\nStopped; no {started} is left running. The same command goes on from here.")
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    if not complete:
        sys.exit(f"{name}: incomplete, see the report. The same command {again} what is missing.")
