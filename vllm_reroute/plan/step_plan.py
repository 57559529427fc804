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

from vllm_reroute.plan.batch_routing import BatchRouting, rows_alike
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

    @property
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


@dataclass(frozen=True)
class Boundary:
    """What happens between the stages before the first decision and those after it.

    parked: tokens of this step whose states are written to pages, `parked_rows` of the step's.
    fetched: tokens of earlier steps whose states are read back. source: [candidates] int64, the row
    of each candidate among the step's tokens followed by the fetched ones.
    shared_text: text whose K/V block gets complete in this step: a decision of the same step may
    already be reading it. first: [requests] int64, position of a request's first candidate.
    text_rows: [requests] int64, leading candidates that are text other requests may share.
    """

    parked: Places
    parked_rows: np.ndarray
    fetched: Places
    source: np.ndarray
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
        """Lengths per stage of the schedule."""
        return tuple(map(StageLengths, self.query_lens, self.seq_lens))

    @cached_property
    def like_stage(self) -> tuple[int, ...]:
        """Per stage, the first of those in a row with the very same lengths."""
        if self.like is not None:
            return self.like
        if self.boundary is None:
            return rows_alike(self.seq_lens)
        return rows_alike(np.concatenate((self.seq_lens, self.query_lens), axis=1))


def plan_step(
    num_computed: np.ndarray,
    num_scheduled: np.ndarray,
    batch: BatchRouting,
    *,
    dense_stages: int,
    block_size: int,
    offers_parked: bool,
) -> StepPlan:
    """Plan a step from the batch's token counts.

    num_computed, num_scheduled: [requests] int64, tokens run before and scheduled now. dense_stages:
    stages before the first decision, 1 or 0. offers_parked: whether parked states are offered for
    reuse, that is, whether prefix caching is on; else only those are written that a later step of
    the request reads.
    """
    num_tokens = int(num_scheduled.sum())
    end = num_computed + num_scheduled
    if (num_computed >= batch.settled).all():
        # All that is ever decided has been: every token runs everywhere.
        held = (end - batch.deferred).astype(np.int32)
        query = np.empty_like(held)
        query[:] = num_scheduled
        everyone = StageLengths(query[0], end.astype(np.int32))
        return StepPlan(num_tokens, query, held, everyone, like=batch.like_stage)
    # Later stages run positions [first, last) of each request.
    first, deferred_before = batch.later_stages(num_computed)
    last, deferred = batch.later_stages(end)
    query = (last - first) - (deferred - deferred_before)
    held = last - deferred
    query[:dense_stages], held[:dense_stages] = num_scheduled, end
    query, held = query.astype(np.int32), held.astype(np.int32)
    turns = batch.turns
    ending = (num_computed[turns.request] < turns.end) & (turns.end <= end[turns.request])
    # Visual tokens of earlier turns that are ranked, too.
    recalled = np.bincount(
        turns.request, weights=turns.recalled * ending, minlength=len(first)
    ).astype(np.int64)
    candidates = StageLengths((last - first + recalled).astype(np.int32), last.astype(np.int32))
    if not ending.any() and (first == num_computed).all() and (last == end).all():
        return StepPlan(num_tokens, query, held, candidates)
    assert np.bincount(turns.request[ending]).max(initial=0) <= 1, "two turns end in one step"
    decided = dict(zip(turns.request[ending].tolist(), turns.end[ending].tolist(), strict=True))
    prefills = tuple(
        _prefill(i, batch.routings[i], turn_end, int(first[i]), candidates)
        for i, turn_end in decided.items()
    )
    boundary = _plan_boundary(
        num_computed,
        num_scheduled,
        batch,
        _candidate_places(first, last, prefills),
        first,
        last,
        _parks(prefills, end, last, block_size, offers_parked),
        block_size,
    )
    return StepPlan(num_tokens, query, held, candidates, prefills, boundary)


def _prefill(
    index: int,
    routing: RequestRouting | None,
    turn_end: int,
    first: int,
    candidates: StageLengths,
) -> ImagePrefill:
    assert routing is not None, "only prompts with visual tokens have turns"
    return ImagePrefill(
        index=index,
        start=int(candidates.query_start_loc[index]),
        num_tokens=int(candidates.query_lens[index]),
        first=first,
        routing=routing,
        turn=next(turn for turn in routing.turns.turns if turn.end == turn_end),
    )


def _parks(
    prefills: tuple[ImagePrefill, ...],
    end: np.ndarray,
    last: np.ndarray,
    block_size: int,
    offers_parked: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions [begin, end) of each request that belong in pages after the step, as far as it runs
    them: those that wait for their question, and what a turn that has been decided leaves there."""
    begin, stop = last.copy(), end.copy()
    for prefill in prefills:
        turn = prefill.turn
        blocks = prefill.routing.left_in_pages(turn, block_size, offered=offers_parked)
        if blocks:
            begin[prefill.index] = turn.begin
            stop[prefill.index] = min(turn.end, blocks.stop * block_size)
    return begin, stop


def _candidate_places(
    first: np.ndarray, last: np.ndarray, prefills: tuple[ImagePrefill, ...]
) -> Places:
    """Request and prompt position of every candidate.

    first, last: [requests], positions between which later stages run all that is not deferred.
    """
    request, place = places_of((last - first).astype(np.int32), last.astype(np.int32))
    recalling = [p for p in prefills if p.num_recalled]
    if recalling:
        starts = np.cumsum(last - first) - (last - first)
        counts = [p.num_recalled for p in recalling]
        before = [int(starts[p.index]) + p.turn.begin - p.first for p in recalling]
        earlier = [p.routing.visual_positions[: p.num_recalled] for p in recalling]
        at = np.repeat(before, counts)
        request = np.insert(request, at, np.repeat([p.index for p in recalling], counts))
        place = np.insert(place, at, np.concatenate(earlier))
    return Places(request.astype(np.int64), place.astype(np.int64))


def _plan_boundary(
    num_computed: np.ndarray,
    num_scheduled: np.ndarray,
    batch: BatchRouting,
    candidates: Places,
    first: np.ndarray,
    last: np.ndarray,
    parks: tuple[np.ndarray, np.ndarray],
    block_size: int,
) -> Boundary:
    """Rows that move between the step, the parked pages and the first decision."""
    end = num_computed + num_scheduled
    starts = np.cumsum(num_scheduled) - num_scheduled

    request, place = candidates.request, candidates.position
    of_step = place >= num_computed[request]
    source = starts[request] + place - num_computed[request]
    source[~of_step] = int(num_scheduled.sum()) + np.arange(int((~of_step).sum()))
    fetched = Places(request[~of_step], place[~of_step])

    parked_rows, parked = _parked_rows(num_computed, num_scheduled, starts, parks)
    # Text-only requests have a prompt of 0 tokens here: all they run is text of their own.
    text_end = np.where(batch.num_prompt == 0, end, batch.text_prefix)
    text_rows = (np.minimum(last, text_end) - first).clip(min=0)
    completes = (place // block_size + 1) * block_size <= last[request]
    shared = (place < text_end[request]) & completes
    return Boundary(
        parked=parked,
        parked_rows=parked_rows,
        fetched=fetched,
        source=source,
        shared_text=Places(request[shared], place[shared]),
        first=first,
        text_rows=text_rows,
    )


def _parked_rows(
    num_computed: np.ndarray,
    num_scheduled: np.ndarray,
    starts: np.ndarray,
    parks: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, Places]:
    """The step's rows that are written to pages, and whose they are.

    starts: [requests], each request's first row. parks: see `_parks`.
    """
    begin, end = parks
    if (begin >= end).all():
        nothing = np.zeros(0, dtype=np.int64)
        return nothing, Places(nothing, nothing)
    request = np.arange(len(num_scheduled)).repeat(num_scheduled)
    rows = np.arange(len(request))
    position = rows - starts[request] + num_computed[request]
    rows = rows[(position >= begin[request]) & (position < end[request])]
    return rows, Places(request[rows], position[rows])
