"""Random steps of a routed engine, their plans, and the block tables a runner would have for them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_reroute.plan.batch_routing import BatchRouting
from vllm_reroute.plan.planning import plan_step
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.step_plan import StepPlan
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.schedule import RoutingSchedule

KINDS = ("text", "decode", "before", "inside", "finishing", "resumed")
"""What a request may do in a step: run text, or as an image request decode, run text before the
image, run a chunk that ends inside the prompt, end its prompt, end it with generated tokens."""


@dataclass(frozen=True)
class Going:
    """One request of a step. routing: None for text. computed, scheduled: tokens, before and now."""

    routing: RequestRouting | None
    computed: int
    scheduled: int

    @property
    def end(self) -> int:
        return self.computed + self.scheduled

    @property
    def candidates(self) -> range:
        """Positions that are at the first decision's input in this step, of earlier steps too."""
        if self.routing is None or self.computed >= self.routing.num_prompt:
            return range(self.computed, self.end)
        prefix = self.routing.text_prefix
        end = self.end if self.end >= self.routing.num_prompt else min(self.end, prefix)
        return range(min(self.computed, prefix), end)

    def held(self, stage: int) -> int:
        """K/V entries of a stage after the step."""
        return self.end if self.routing is None else self.routing.kv_length(stage, self.end)

    def held_before(self, stage: int) -> int:
        if self.routing is None:
            return self.computed
        return self.routing.kv_length(stage, self.computed)


def routing_of(
    spans: VisualSpans | None,
    prompt: int | Sequence[int],
    schedule: RoutingSchedule,
    block_size: int = 4,
) -> RequestRouting | None:
    tokens = range(prompt) if isinstance(prompt, int) else prompt
    return RequestRouting.of(spans, tokens, schedule, block_size)


def plan_of(
    batch: Sequence[Going],
    schedule: RoutingSchedule,
    block_size: int = 4,
    offers_parked: bool = True,
) -> StepPlan:
    return plan_step(
        np.array([r.computed for r in batch], dtype=np.int64),
        np.array([r.scheduled for r in batch], dtype=np.int64),
        BatchRouting.of([r.routing for r in batch], len(schedule.stages)),
        dense_stages=int(schedule.encoder_ratio is None),
        block_size=block_size,
        offers_parked=offers_parked,
    )


def random_going(
    rng: random.Random, schedule: RoutingSchedule, kind: str, block_size: int = 4
) -> Going:
    """A request of up to 60 prompt tokens that does what `kind` says."""
    if kind == "text":
        return Going(None, rng.choice((0, rng.randint(0, 50))), rng.choice((1, rng.randint(1, 14))))
    while True:
        num_prompt = rng.randint(6, 60)
        cuts = sorted(rng.sample(range(num_prompt), 2 * rng.randint(1, 2)))
        spans = VisualSpans(tuple(cuts[::2]), tuple(cuts[1::2]))
        routing = routing_of(spans, num_prompt, schedule, block_size)
        prefix = routing.text_prefix
        if kind == "before" and prefix:
            computed = rng.randrange(prefix)
            return Going(routing, computed, rng.randint(computed + 1, prefix) - computed)
        if kind == "inside" and prefix + 1 < num_prompt:
            end = rng.randint(prefix + 1, num_prompt - 1)
            computed = rng.choice((rng.randrange(end), max(end - 5, 0)))
            return Going(routing, computed, end - computed)
        if kind in ("finishing", "resumed"):
            computed = rng.choice((0, prefix, num_prompt - 1, rng.randrange(num_prompt)))
            computed = min(computed, num_prompt - 1)
            more = rng.randint(1, 9) if kind == "resumed" else 0
            return Going(routing, computed, num_prompt - computed + more)
        if kind == "decode":
            return Going(routing, num_prompt + rng.randint(0, 20), rng.choice((1, 1, 3)))


def random_batch(
    rng: random.Random,
    schedule: RoutingSchedule,
    kinds: Sequence[str] = KINDS,
    *,
    most_requests: int = 8,
    most_tokens: int = 96,
    block_size: int = 4,
) -> list[Going]:
    """Some requests in any order, of no more tokens than a step may hold."""
    batch: list[Going] = []
    for _ in range(rng.randint(1, most_requests)):
        going = random_going(rng, schedule, rng.choice(kinds), block_size)
        if sum(r.scheduled for r in batch) + going.scheduled <= most_tokens:
            batch.append(going)
    return batch or [Going(None, 3, 1)]


class Tables:
    """Block tables of a batch, one per stage, as vLLM keeps them.

    Blocks a request holds are its own; entries behind them are left from earlier requests.
    """

    def __init__(
        self,
        batch: Sequence[Going],
        schedule: RoutingSchedule,
        *,
        max_blocks: int,
        block_size: int = 4,
        padding: int = 0,
        seed: int = 0,
    ) -> None:
        self.block_size = block_size
        self.num_layers = [stage.num_layers for stage in schedule.stages]
        total = len(batch) * max_blocks * sum(self.num_layers)
        rng = np.random.default_rng(seed)
        ids, used = rng.permutation(np.arange(1, total + 1)), 0
        self.interleaved: list[torch.Tensor] = []
        for stage, layers in enumerate(self.num_layers):
            table = rng.integers(1, total, (len(batch) + padding, layers * max_blocks))
            table[len(batch) :] = 0
            for row, request in zip(table, batch, strict=False):
                count = -(-request.held(stage) // block_size) * layers
                row[:count] = ids[used : used + count]
                used += count
            self.interleaved.append(torch.from_numpy(table.astype(np.int32)))
        self.num_blocks = total + 1

    def block(self, stage: int, layer: int, request: int, index: int) -> int:
        """Block `index` of a request in layer `layer` of a stage."""
        return int(self.interleaved[stage][request, index * self.num_layers[stage] + layer])

    def slot(self, stage: int, layer: int, request: int, place: int) -> int:
        block = self.block(stage, layer, request, place // self.block_size)
        return block * self.block_size + place % self.block_size
