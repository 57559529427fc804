"""A prompt cut into turns: which visual tokens one question ranks, and what that leaves in a stage.

Inside a turn's *inside*, behind its begin and before its end, stages after the first decision have
run up to its begin only: the tokens behind it wait for the turn's question. Token counts outside
every inside are *allowed*: there each stage holds all text and what it keeps of earlier turns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_reroute.plan.visual_spans import VisualSpans


@dataclass(frozen=True)
class Turn:
    """Visual tokens that are ranked together.

    begin: tokens from this position on wait for the decisions. end: one past the token that ranks,
    the last of the question. size: visual tokens that are ranked. kept: per stage, those that run
    there. visual_end: one past the last visual token of its own; 0 where it has none and *recalls*: it
    ranks those of all earlier turns. What runs of them then stands in front of `begin` in a stage's
    K/V, and the tokens from there on see it.
    """

    begin: int
    end: int
    size: int
    kept: tuple[int, ...]
    visual_end: int

    @property
    def recalls(self) -> bool:
        """Whether it brings back visual tokens of earlier turns."""
        return not self.visual_end

    @property
    def num_recalled(self) -> int:
        """Visual tokens of earlier turns that are ranked."""
        return self.size if self.recalls else 0

    def deferred(self, stage: int) -> int:
        """Visual tokens of the turn's own that do NOT run in a stage, less those it brings back."""
        return self.size - self.num_recalled - self.kept[stage]

    def reusable(self, block_size: int) -> range:
        """Blocks of tokens that hold states which no question has chosen, for later turns and prompts: those that
        the turn fills, and all in which it has visual tokens."""
        end = max(self.end // block_size, -(-self.visual_end // block_size))
        return range(self.begin // block_size, end)

    def recallable(self, block_size: int) -> range:
        """Blocks of tokens, from its first visual token's to its last one's."""
        return range(self.begin // block_size, -(-self.visual_end // block_size))

    def is_inside(self, num_tokens: int) -> bool:
        """Whether the turn's decisions are still to come once `num_tokens` tokens have run."""
        return self.begin < num_tokens < self.end


@dataclass(frozen=True)
class Turns:
    """All turns of a prompt that take decisions, in order."""

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

    def with_pictures(self) -> Iterator[Turn]:
        """Those that bring visual tokens."""
        return (turn for turn in self.turns if not turn.recalls)

    def last_recall(self) -> int:
        """End of the last turn that brings tokens back; 0 where none does."""
        return max((turn.end for turn in self.turns if turn.recalls), default=0)

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


@dataclass(frozen=True)
class Cut:
    """A turn as its prompt shows it.

    first: position of its first visual token; without any, of the marker it ends with. end: one past
    that marker. size: visual tokens. visual_end: one past the last of them; 0 without any.
    """

    first: int
    end: int
    size: int
    visual_end: int


def cut_at_markers(spans: VisualSpans, prompt: Sequence[int], marker: Sequence[int]) -> list[Cut]:
    """The turns with visual tokens, and those behind the first of them that have none.

    marker: token ids by which a prompt asks the assistant to speak; a turn ends with it. Raises
    ValueError for visual tokens with no marker behind them.
    """
    ends = _marker_ends(prompt, marker)
    turns: dict[int, Cut] = {}
    for start, stop in zip(spans.starts, spans.ends, strict=True):
        place = bisect_left(ends, stop + len(marker))
        if place == len(ends):
            raise ValueError(f"no marker behind the visual tokens that end at {stop}")
        end = ends[place]
        before = turns.get(end, Cut(start, end, 0, 0))
        turns[end] = Cut(before.first, end, before.size + stop - start, stop)
    first = min(turns)
    for end in ends:
        if end > first and end not in turns:
            turns[end] = Cut(end - len(marker), end, 0, 0)
    return [turns[end] for end in sorted(turns)]


def _marker_ends(prompt: Sequence[int], marker: Sequence[int]) -> list[int]:
    """One past every occurrence of the marker, ascending."""
    tokens, length = np.asarray(prompt), len(marker)
    if len(tokens) < length:
        return []
    found = np.ones(len(tokens) - length + 1, dtype=bool)
    for place, token in enumerate(marker):
        found &= tokens[place : len(tokens) - length + 1 + place] == token
    return (found.nonzero()[0] + length).tolist()
