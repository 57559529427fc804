"""How many visual tokens of earlier turns a question brings back (`--reroute-history recall`).

The numbers follow from a prompt's layout alone, so scheduler and worker know every length ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

RECALL_SHARE = 0.25
"""Of what a stage keeps of so many visual tokens, the share that one question brings back."""

RECALL_CAP = 2
"""What a stage may hold of a conversation's pictures, as a multiple of what their own questions keep."""


class RecallCounts:
    """The turns of one conversation in order: what they add to each stage's visual tokens.

    kept_of: visual tokens that each stage keeps of so many.
    """

    def __init__(self, kept_of: Callable[[int], Sequence[int]]) -> None:
        self._kept_of = kept_of
        self._num_visual = 0
        self._kept: list[int] = []
        self._held: list[int] = []

    @property
    def num_visual(self) -> int:
        """Of all turns so far."""
        return self._num_visual

    def picture(self, size: int) -> tuple[int, ...]:
        """A turn that brings `size` visual tokens: [stages], those that run there."""
        kept = tuple(self._kept_of(size))
        self._kept = _sums(self._kept, kept)
        self._held = _sums(self._held, kept)
        self._num_visual += size
        return kept

    def question(self) -> tuple[int, ...]:
        """A turn of text: [stages], earlier visual tokens that run there now, and have not before."""
        brought = tuple(
            max(
                0,
                min(
                    max(1, int(RECALL_SHARE * share)),
                    RECALL_CAP * kept - held,
                    self._num_visual - held,
                ),
            )
            for share, kept, held in zip(
                self._kept_of(self._num_visual), self._kept, self._held, strict=True
            )
        )
        self._held = _sums(self._held, brought)
        return brought


def _sums(first: Sequence[int], second: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(first, second, strict=True)] if first else list(second)
