"""What a scheduler tells front ends about routing: per request where it begins, is decided and ends."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_reroute.metrics.catalogue import (
    ALL_STAGES,
    BROUGHT_BACK,
    DEFERRED,
    FIRST_STAGE,
    IN_CHUNKS,
    KEPT,
    KV_ALLOCATED,
    KV_DENSE,
    KV_HELD,
    KV_SAVED,
    PARKED,
    PREFIX_CACHE,
    REQUEST,
    REQUESTS,
    SEEN,
    SERVER,
)
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.schedule import RoutingSchedule
from vllm_reroute.schedule.options import NO_SCHEDULE
from vllm_reroute.schedule.request_options import RequestOptions

HOLDINGS_EVERY_S = 1.0
"""How often what live requests hold is added up; it changes with nearly every step."""


class LiveRequests(Protocol):
    """What is asked of the scheduler's live requests."""

    requests: Any
    schedule: RoutingSchedule
    block_size: int

    def of(self, request: Request) -> RequestRouting | None: ...


class RoutingCounts:
    """Counts for `/metrics`. In a step of requests that only decode, none of them is looked at.

    live: the scheduler's requests. block_bytes: bytes of one block, which holds `block_size` tokens
    of one layer. parked_blocks: blocks in which states are parked now. clock: seconds.
    """

    def __init__(
        self,
        live: LiveRequests,
        *,
        block_bytes: int,
        parked_blocks: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.live, self.block_bytes, self.parked_blocks = live, block_bytes, parked_blocks
        self._clock = clock
        self._counted: Counter[str] = Counter()
        self._begun: dict[str, RequestRouting] = {}
        self._prefilling: set[str] = set()
        self._decided: set[str] = set()
        self._holdings, self._due = (0, 0), 0.0
        self._shown: dict[str, int] = {}

    def read_from_cache(self, request: Request, num_tokens: int) -> None:
        """A request is admitted with that many tokens of the prefix cache.

        As in vLLM's own count, what a request reads again after a preemption is left out.
        """
        if not num_tokens or request.num_preemptions:
            return
        routing = self.live.of(request)
        everywhere = num_tokens if routing is None else routing.turns.allowed(num_tokens)
        self._counted[PREFIX_CACHE.series(ALL_STAGES)] += everywhere
        self._counted[PREFIX_CACHE.series(FIRST_STAGE)] += num_tokens - everywhere

    def scheduled(self, output: SchedulerOutput) -> None:
        """A step has been planned, and its tokens count as computed."""
        for new in output.scheduled_new_reqs:
            self._begin(new.req_id)
        for request_id in output.scheduled_cached_reqs.resumed_req_ids:
            self._begin(request_id)
        for request_id in list(self._prefilling):
            request, routing = self.live.requests[request_id], self._begun[request_id]
            if request.num_computed_tokens >= routing.num_prompt:
                self._prefilling.remove(request_id)
                if request_id not in self._decided:
                    self._decided.add(request_id)
                    self._decide(request, routing)

    def brought_back(self, of_stages: Sequence[int]) -> None:
        """A turn of a request has been decided: [stages], how many tokens each has got back."""
        for stage, count in enumerate(of_stages):
            if count:
                self._counted[BROUGHT_BACK.series(str(stage))] += count

    def finished(self, request: Request) -> None:
        """A request ends; it still knows how far it has come."""
        routing = self._begun.pop(request.request_id, None)
        if routing is None:
            return
        self._prefilling.discard(request.request_id)
        self._decided.discard(request.request_id)
        # With asynchronous scheduling a step may be under way whose token nobody wants any more.
        wanted = max(routing.num_prompt, request.num_tokens - 1)
        num_tokens = min(request.num_computed_tokens, wanted)
        if num_tokens >= routing.num_prompt:
            held, dense = self._blocks(routing, num_tokens)
            self._counted[KV_ALLOCATED.series()] += held * self.block_bytes
            self._counted[KV_SAVED.series()] += (dense - held) * self.block_bytes

    def take(self) -> dict[str, int]:
        """By series: what counters have grown by since the last call, and gauges that have changed."""
        gauges = self._gauges()
        news = {name: value for name, value in gauges.items() if self._shown.get(name) != value}
        self._shown = gauges
        if self._counted:
            news.update(self._counted)
            self._counted.clear()
        return news

    def _begin(self, request_id: str) -> None:
        routing = self.live.of(self.live.requests[request_id])
        if routing is not None:
            self._begun[request_id] = routing
            self._prefilling.add(request_id)

    def _decide(self, request: Request, routing: RequestRouting) -> None:
        options = RequestOptions.of(getattr(request.sampling_params, "extra_args", None))
        dense = options is not None and options.schedule == NO_SCHEDULE
        own = options is not None and any((options.tier, options.budget, options.keep, dense))
        schedule = NO_SCHEDULE if dense else self.live.schedule.name
        self._counted[REQUESTS.series(schedule, REQUEST if own else SERVER)] += 1
        num_visual = routing.spans.num_visual
        for stage, kept in enumerate(routing.kept):
            self._counted[SEEN.series(str(stage))] += num_visual
            self._counted[KEPT.series(str(stage))] += kept
            self._counted[DEFERRED.series(str(stage))] += num_visual - kept

    def _gauges(self) -> dict[str, int]:
        held, dense = self._held()
        running = (self.live.requests[request_id] for request_id in self._prefilling)
        return {
            KV_HELD.series(): held * self.block_bytes,
            KV_DENSE.series(): dense * self.block_bytes,
            IN_CHUNKS.series(): sum(request.num_computed_tokens > 0 for request in running),
            PARKED.series(): self.parked_blocks() * self.block_bytes,
        }

    def _held(self) -> tuple[int, int]:
        """Blocks of all image requests under way, and what they would be without routing."""
        now = self._clock()
        if not self._begun:
            self._holdings, self._due = (0, 0), now
        elif now >= self._due:
            self._holdings, self._due = self._add_up(), now + HOLDINGS_EVERY_S
        return self._holdings

    def _add_up(self) -> tuple[int, int]:
        size, schedule = self.live.block_size, self.live.schedule
        held = dense = 0
        lengths, deferred = [], []
        for request_id, routing in self._begun.items():
            num_tokens = self.live.requests[request_id].num_computed_tokens
            if num_tokens < routing.num_prompt:
                blocks = self._blocks(routing, num_tokens)
                held, dense = held + blocks[0], dense + blocks[1]
            else:
                lengths.append(num_tokens)
                deferred.append(routing.deferred)
        if lengths:
            # [requests, stages]: all that decode at once, of whom there are many.
            of_stages = np.array(lengths)[:, None] - np.array(deferred)
            layers = np.array([stage.num_layers for stage in schedule.stages])
            held += int((-(-of_stages // size) @ layers).sum())
            dense += schedule.num_layers * int((-(-np.array(lengths) // size)).sum())
        return held, dense

    def _blocks(self, routing: RequestRouting, num_tokens: int) -> tuple[int, int]:
        """Blocks a request holds once that many of its tokens have run: routed, and dense."""
        size, stages = self.live.block_size, self.live.schedule.stages
        held = sum(
            stage.num_layers * -(-routing.kv_length(index, num_tokens) // size)
            for index, stage in enumerate(stages)
        )
        return held, self.live.schedule.num_layers * -(-num_tokens // size)
