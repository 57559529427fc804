"""The routing facts of the scheduler's live requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.v1.request import Request

from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.turns import Turn, Turns
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.schedule import RoutingSchedule

_UNKNOWN: Any = object()
_ATTRIBUTE = "reroute_routing"
"""Of a request, so that what is known of it lives exactly as long, and is looked up in no time."""


class LiveRouting:
    """Derives `RequestRouting` once per request; it goes when the request goes.

    requests: the scheduler's own mapping of live requests by id. block_size: tokens per K/V block.
    offers_parked: whether prefix caching is on. max_step_tokens: tokens a step may hold.
    """

    def __init__(
        self,
        requests: Mapping[str, Request],
        schedule: RoutingSchedule,
        *,
        block_size: int,
        offers_parked: bool,
        max_step_tokens: int,
    ) -> None:
        self.requests = requests
        self.schedule = schedule
        self.block_size = block_size
        self.offers_parked = offers_parked
        self.max_step_tokens = max_step_tokens

    def of(self, request: Request) -> RequestRouting | None:
        """None for a request without visual tokens."""
        if not request.mm_features:
            return None
        routing = getattr(request, _ATTRIBUTE, _UNKNOWN)
        if routing is _UNKNOWN:
            routing = RequestRouting.of(
                VisualSpans.of(request.mm_features),
                request.prompt_token_ids,
                self.schedule,
                self.block_size,
                getattr(request.sampling_params, "extra_args", None),
            )
            setattr(request, _ATTRIBUTE, routing)
        return routing

    def stops_of(self, request: Request, turn: Turn) -> set[int]:
        """Starts of a turn's images behind its first, and its end (`plan/chunks.py`)."""
        places = [feature.mm_position for feature in request.mm_features]
        starts = sorted(
            place.offset
            for place in places
            if turn.begin < place.offset + place.length and place.offset < turn.end
        )
        return {*starts[1:], turn.end}

    def turns_of(self, request: Request) -> Turns:
        """Of a request with visual tokens."""
        routing = self.of(request)
        assert routing is not None, "only prompts with visual tokens have turns"
        return routing.turns

    def of_id(self, request_id: str) -> RequestRouting | None:
        """The same by id; None for a request that is gone, too."""
        request = self.requests.get(request_id)
        return None if request is None else self.of(request)
