"""From a batch's token counts to the plan of its step."""

from __future__ import annotations

import numpy as np

from vllm_reroute.plan.batch_routing import BatchRouting
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.step_plan import (
    NOWHERE,
    Boundary,
    ImagePrefill,
    Places,
    StageLengths,
    StepPlan,
    places_of,
)
from vllm_reroute.plan.turns import Turn


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
    ending = batch.turns.ending(num_computed, end)
    # Visual tokens of earlier turns are ranked, too, where such a turn ends.
    num_candidates = last - first
    for request, turn in ending:
        num_candidates[request] += turn.num_recalled
    candidates = StageLengths(num_candidates.astype(np.int32), last.astype(np.int32))
    are_the_steps = bool((first == num_computed).all() and (last == end).all())
    if not ending and are_the_steps:
        return StepPlan(num_tokens, query, held, candidates)
    prefills = tuple(
        _prefill(request, turn, batch.routings[request], int(first[request]), candidates)
        for request, turn in ending
    )
    boundary = _plan_boundary(
        num_computed,
        num_scheduled,
        batch,
        prefills,
        first,
        last,
        block_size,
        are_the_steps=are_the_steps and not any(prefill.num_recalled for prefill in prefills),
        offers_parked=offers_parked,
    )
    return StepPlan(num_tokens, query, held, candidates, prefills, boundary)


def _prefill(
    index: int, turn: Turn, routing: RequestRouting | None, first: int, candidates: StageLengths
) -> ImagePrefill:
    assert routing is not None, "only prompts with visual tokens have turns"
    return ImagePrefill(
        index=index,
        start=int(candidates.query_start_loc[index]),
        num_tokens=int(candidates.query_lens[index]),
        first=first,
        routing=routing,
        turn=turn,
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
    prefills: tuple[ImagePrefill, ...],
    first: np.ndarray,
    last: np.ndarray,
    block_size: int,
    *,
    are_the_steps: bool,
    offers_parked: bool,
) -> Boundary:
    """Rows that move between the step, the parked pages and the first decision.

    are_the_steps: whether the candidates are the step's tokens, no more and no less.
    """
    end = num_computed + num_scheduled
    starts = np.cumsum(num_scheduled) - num_scheduled
    parks = _parks(prefills, end, last, block_size, offers_parked)
    parked_rows, parked = _parked_rows(num_computed, num_scheduled, starts, parks)
    # Text-only requests have a prompt of 0 tokens here: all they run is text of their own.
    text_end = np.where(batch.num_prompt == 0, end, batch.text_prefix)
    source, fetched, shared_text = None, NOWHERE, NOWHERE
    sees_cached_text = any(prefill.first for prefill in prefills)
    if sees_cached_text or not are_the_steps:
        candidates = _candidate_places(first, last, prefills)
        request, place = candidates.request, candidates.position
        if not are_the_steps:
            of_step = place >= num_computed[request]
            source = starts[request] + place - num_computed[request]
            source[~of_step] = int(num_scheduled.sum()) + np.arange(int((~of_step).sum()))
            fetched = candidates.take(~of_step)
        if sees_cached_text:
            completes = (place // block_size + 1) * block_size <= last[request]
            shared_text = candidates.take((place < text_end[request]) & completes)
    return Boundary(
        parked=parked,
        parked_rows=parked_rows,
        fetched=fetched,
        source=source,
        shared_text=shared_text,
        first=first,
        text_rows=np.maximum(np.minimum(last, text_end) - first, 0),
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
        return NOWHERE.position, NOWHERE
    request = np.arange(len(num_scheduled)).repeat(num_scheduled)
    rows = np.arange(len(request))
    position = rows - starts[request] + num_computed[request]
    rows = rows[(position >= begin[request]) & (position < end[request])]
    return rows, Places(request[rows], position[rows])
