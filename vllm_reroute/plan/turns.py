"""A prompt cut into turns: which visual tokens one question ranks, and what that leaves in a stage.

Inside a turn's *inside*, behind its begin and before its end, stages after the first decision have
run up to its begin only: the tokens behind it wait for the turn's question. Token counts outside
every inside are *allowed*: there each stage holds all text and what it keeps of earlier turns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_reroute.plan.visual_spans import VisualSpans


@dataclass(frozen=True)
class Turn:
    """Visual tokens that are ranked together.

    begin: tokens from this position on wait for the decisions. end: one past the token that ranks,
    the last of the question. size: visual tokens. kept: per stage, those that run there.
    """

    begin: int
    end: int
    size: int
    kept: tuple[int, ...]

    def deferred(self, stage: int) -> int:
        """Visual tokens that do NOT run in a stage."""
        return self.size - self.kept[stage]

    def is_inside(self, num_tokens: int) -> bool:
        """Whether the turn's decisions are still to come once `num_tokens` tokens have run."""
        return self.begin < num_tokens < self.end


@dataclass(frozen=True)
class Turns:
    """All turns of a prompt that have visual tokens, in order."""

    turns: tuple[Turn, ...]

    def open_at(self, num_tokens: int) -> Turn | None:
        """The turn that waits for its question after `num_tokens` tokens."""
        return next((turn for turn in self.turns if turn.is_inside(num_tokens)), None)

    def undecided_at(self, num_tokens: int) -> Turn | None:
        """The first turn that is not decided after `num_tokens` tokens."""
        return next((turn for turn in self.turns if turn.end > num_tokens), None)

    def next_end(self, num_tokens: int) -> int | None:
        """Its end."""
        turn = self.undecided_at(num_tokens)
        return None if turn is None else turn.end

    def allowed(self, num_tokens: int) -> int:
        """Tokens that stages after the first decision have run of the first `num_tokens`."""
        turn = self.open_at(num_tokens)
        return num_tokens if turn is None else turn.begin

    def length(self, stage: int, num_tokens: int) -> int:
        """K/V entries of a stage after the first decision, for the first `num_tokens` tokens."""
        gone = sum(turn.deferred(stage) for turn in self.turns if turn.end <= num_tokens)
        return self.allowed(num_tokens) - gone

    def reach(self, stage: int, length: int) -> int:
        """The largest allowed token count with no more than `length` entries in a stage."""
        num_tokens = length
        for turn in self.turns:
            if num_tokens <= turn.begin:
                break
            num_tokens += turn.deferred(stage)
            if num_tokens < turn.end:
                return turn.begin
        return num_tokens

    def needed(self, stage: int, length: int) -> int:
        """The smallest allowed token count with at least `length` entries in a stage.

        All these tokens are what the first `length` entries depend on.
        """
        num_tokens = length
        for turn in self.turns:
            if num_tokens <= turn.begin:
                break
            num_tokens += turn.deferred(stage)
            if num_tokens <= turn.end:
                return turn.end
        return num_tokens


def cut_at_markers(
    spans: VisualSpans, prompt: Sequence[int], marker: Sequence[int]
) -> list[tuple[int, int, int]]:
    """First visual token, end and visual tokens of each turn: it ends with the next marker.

    marker: token ids by which a prompt asks the assistant to speak. Raises ValueError for visual
    tokens with no marker behind them.
    """
    ends = _marker_ends(prompt, marker)
    turns: dict[int, tuple[int, int]] = {}
    for start, stop in zip(spans.starts, spans.ends, strict=True):
        place = bisect_left(ends, stop + len(marker))
        if place == len(ends):
            raise ValueError(f"no marker behind the visual tokens that end at {stop}")
        first, size = turns.get(ends[place], (start, 0))
        turns[ends[place]] = first, size + stop - start
    return [(first, end, size) for end, (first, size) in turns.items()]


def _marker_ends(prompt: Sequence[int], marker: Sequence[int]) -> list[int]:
    """One past every occurrence of the marker, ascending."""
    tokens, length = np.asarray(prompt), len(marker)
    if len(tokens) < length:
        return []
    found = np.ones(len(tokens) - length + 1, dtype=bool)
    for place, token in enumerate(marker):
        found &= tokens[place : len(tokens) - length + 1 + place] == token
    return (found.nonzero()[0] + length).tolist()
