"""What the run is doing, on standard error: a bar over waves, with whose turn it is beside it."""

import contextlib
import re
import sys
from collections.abc import Iterator

from tqdm import tqdm


class Progress:
    def __init__(self, waves: int) -> None:
        self._bar = tqdm(total=waves, unit="wave", dynamic_ncols=True, file=sys.stderr)

    def expect(self, waves: int) -> None:
        self._bar.total = waves
        self._bar.refresh()

    def begin(self, wave: str) -> None:
        self._bar.set_description(wave)

    def turn(self, what: str, who: str) -> None:
        self._bar.set_postfix_str(f"{what}, {who}")

    def say(self, line: str) -> None:
        self._bar.set_postfix_str(line)

    @contextlib.contextmanager
    def server_lines(self) -> Iterator[None]:
        """Lines a starting server's program prints to standard error go beside the bar."""
        with contextlib.redirect_stderr(self):
            yield

    def write(self, text: str) -> int:
        if text.strip():
            self.say(re.sub(r"^\[[\w ]+\] ", "", text.strip()))
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def note(self, line: str) -> None:
        """A line that stays."""
        self._bar.write(line, file=sys.stderr)

    def finish(self) -> None:
        self._bar.update()

    def close(self) -> None:
        self._bar.set_postfix_str("")
        self._bar.close()
