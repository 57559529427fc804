"""The plan of one engine step: which requests run which rows in which stage.

A prompt's progress is a function of the tokens it has run, not a state. A turn of it ranks the
visual tokens between its begin B and its end E (`turns.py`; a prompt is one turn unless its history
keeps its choice). With n the tokens run, stages after the first decision have run

    n <= B      n tokens, without those that earlier turns have deferred
    B < n < E   as with B: the others have run the stages before it and are *parked* at its input
    n >= E      all text and the visual tokens each stage keeps

so scheduler and worker need to tell each other nothing. In a step no more than one turn of a
request ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_reroute.plan.batch_routing import rows_alike
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.turns import Turn


@dataclass(frozen=True)
class StageLengths:
    """Lengths one stage sees in this step.

    query_lens: [requests] int32, tokens that run; may be 0. seq_lens: [requests] int32, K/V entries
    held once the step has written its own.
    """

    query_lens: np.ndarray
    seq_lens: np.ndarray

    @cached_property
    def query_start_loc(self) -> np.ndarray:
        """[requests + 1] int32."""
        starts = np.zeros(len(self.query_lens) + 1, dtype=np.int32)
        np.cumsum(self.query_lens, out=starts[1:])
        return starts

    @cached_property
    def num_tokens(self) -> int:
        return int(self.query_start_loc[-1])

    @cached_property
    def request_and_position(self) -> tuple[np.ndarray, np.ndarray]:
        """[tokens] int32 each, for the tokens that run: their request, and their place in its K/V."""
        return places_of(self.query_lens, self.seq_lens)


def places_of(query_lens: np.ndarray, seq_lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Request [tokens] of each token that runs, and its place in the request's K/V, both int32.

    query_lens: [requests]. seq_lens: [requests] or [stages, requests]; so are the places, by tokens.
    """
    request = np.arange(len(query_lens), dtype=np.int32)
    if (query_lens == 1).all():
        return request, seq_lens - 1
    ends = query_lens.cumsum(dtype=np.int32)
    request = request.repeat(query_lens)
    return request, np.arange(len(request), dtype=np.int32) + (seq_lens - ends)[..., request]


@dataclass(frozen=True)
class ImagePrefill:
    """A request that has a turn decided in this step.

    index: its row in the step's batch. start: its first candidate among the step's. num_tokens: its
    candidates: tokens from prompt position `first` on, since the stages' K/V holds what is before it
    already, and, in front of the turn's begin, visual tokens of earlier turns where it ranks them.
    routing: its lasting facts. turn: the one that ends.
    """

    index: int
    start: int
    num_tokens: int
    first: int
    routing: RequestRouting
    turn: Turn

    @property
    def num_turn_rows(self) -> int:
        """Candidates up to the turn's end; what follows it may run in the same step."""
        return self.turn.end - self.first + self.num_recalled

    @property
    def num_recalled(self) -> int:
        """Candidates that are visual tokens of earlier turns."""
        return self.turn.num_recalled

    @cached_property
    def ranked(self) -> np.ndarray:
        """bool [num_tokens]: candidates that are ranked, all of them visual tokens."""
        if not self.turn.recalls:
            return self.routing.spans.mask(self.first + self.num_tokens)[self.first :]
        ranked = np.zeros(self.num_tokens, dtype=bool)
        before = self.turn.begin - self.first
        ranked[before : before + self.turn.size] = True
        return ranked

    @property
    def is_later_turn(self) -> bool:
        """Whether earlier turns of the prompt have been decided."""
        return self.turn is not self.routing.turns.turns[0]

    @property
    def seed(self) -> int:
        """What chance depends on."""
        return self.routing.seed(self.turn)

    def num_held(self, stage: int) -> int:
        """Tokens before the first candidate that the stage has K/V of."""
        return self.routing.kv_length(stage, self.first)


@dataclass(frozen=True)
class Places:
    """Tokens by request and prompt position, both [n] int64."""

    request: np.ndarray
    position: np.ndarray

    def __len__(self) -> int:
        return len(self.request)

    def take(self, rows: np.ndarray) -> Places:
        return Places(self.request[rows], self.position[rows])


_NOTHING = np.zeros(0, dtype=np.int64)
NOWHERE = Places(_NOTHING, _NOTHING)


@dataclass(frozen=True)
class Boundary:
    """What happens between the stages before the first decision and those after it.

    parked: tokens of this step whose states are written to pages, `parked_rows` of the step's.
    fetched: tokens of earlier steps whose states are read back. source: [candidates] int64, the row
    of each candidate among the step's tokens followed by the fetched ones; None where the candidates
    are the step's tokens. shared_text: text whose K/V block gets complete in this step, since a
    decision of the same step may already be reading it; none where all decisions see all of their
    prompts. first: [requests] int64, position of a request's first candidate.
    text_rows: [requests] int64, leading candidates that are text other requests may share.
    """

    parked: Places
    parked_rows: np.ndarray
    fetched: Places
    source: np.ndarray | None
    shared_text: Places
    first: np.ndarray
    text_rows: np.ndarray


@dataclass(frozen=True)
class StepPlan:
    """One step, complete before it runs. Everything here lives on the host.

    num_tokens: tokens of the step. query_lens, seq_lens: [stages, requests] int32, see `StageLengths`.
    candidates: lengths at the input of the first decision layer. prefills: requests whose decisions
    are taken now. boundary: None where every token of the step simply runs all stages. like: what
    `like_stage` is, where it is known beforehand.
    """

    num_tokens: int
    query_lens: np.ndarray
    seq_lens: np.ndarray
    candidates: StageLengths
    prefills: tuple[ImagePrefill, ...] = ()
    boundary: Boundary | None = None
    like: tuple[int, ...] | None = None

    @property
    def num_reqs(self) -> int:
        return self.seq_lens.shape[1]

    @cached_property
    def stages(self) -> tuple[StageLengths, ...]:
        """Lengths per stage of the schedule; the very same object where they are the same."""
        stages: list[StageLengths] = []
        for stage, first in enumerate(self.like_stage):
            same = stages[first] if first < stage else None
            stages.append(same or StageLengths(self.query_lens[stage], self.seq_lens[stage]))
        return tuple(stages)

    @cached_property
    def like_stage(self) -> tuple[int, ...]:
        """Per stage, the first of those in a row with the very same lengths."""
        if self.like is not None:
            return self.like
        if self.boundary is None:
            return rows_alike(self.seq_lens)
        return rows_alike(np.concatenate((self.seq_lens, self.query_lens), axis=1))
