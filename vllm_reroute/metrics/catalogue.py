"""Every metric of a routed engine. Scheduler, front ends, documentation and dashboard follow this table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from vllm_reroute.schedule import RoutingSchedule
from vllm_reroute.schedule.options import NO_SCHEDULE

ALL_STAGES, FIRST_STAGE = "all_stages", "first_stage"
SERVER, REQUEST = "server", "request"

LabelValues = Callable[[RoutingSchedule], tuple[tuple[str, ...], ...]]


class Kind(StrEnum):
    """How vLLM's front ends add up what they are told."""

    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric, beside vLLM's own labels `model_name` and `engine`.

    name: as vLLM names its own; a counter is shown with `_total` behind it. labels: names of its
    own labels. values: what they may be in an engine of a schedule, a tuple per series.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    values: LabelValues = lambda schedule: ((),)

    def series(self, *label_values: str) -> str:
        """The name under which a series travels from a scheduler to a front end."""
        assert len(label_values) == len(self.labels), (self.name, label_values)
        return "/".join((self.name, *label_values))


def _stages(schedule: RoutingSchedule) -> tuple[tuple[str, ...], ...]:
    return tuple((str(stage),) for stage in range(len(schedule.stages)))


def _choices(schedule: RoutingSchedule) -> tuple[tuple[str, ...], ...]:
    return (schedule.name, SERVER), (schedule.name, REQUEST), (NO_SCHEDULE, REQUEST)


REQUESTS = Metric(
    name="vllm:reroute_requests",
    kind=Kind.COUNTER,
    help="Number of image requests whose routing has been decided, by the schedule they ran and by "
    "who chose how much to keep, the server or the request.",
    labels=("schedule", "budget"),
    values=_choices,
)
SEEN = Metric(
    name="vllm:reroute_visual_tokens_seen",
    kind=Kind.COUNTER,
    help="Number of visual tokens of routed image requests, by stage: those that run it and those "
    "that do not.",
    labels=("stage",),
    values=_stages,
)
KEPT = Metric(
    name="vllm:reroute_visual_tokens_kept",
    kind=Kind.COUNTER,
    help="Number of visual tokens that run a stage.",
    labels=("stage",),
    values=_stages,
)
DEFERRED = Metric(
    name="vllm:reroute_visual_tokens_deferred",
    kind=Kind.COUNTER,
    help="Number of visual tokens that do not run a stage: they bypass it, or, where the action is "
    "remove, are gone.",
    labels=("stage",),
    values=_stages,
)
BROUGHT_BACK = Metric(
    name="vllm:reroute_visual_tokens_brought_back",
    kind=Kind.COUNTER,
    help="Number of visual tokens that run a stage although an earlier one has deferred them.",
    labels=("stage",),
    values=_stages,
)
KV_ALLOCATED = Metric(
    name="vllm:reroute_kv_bytes_allocated",
    kind=Kind.COUNTER,
    help="Bytes of K/V blocks, on each worker, that image requests held when they finished.",
)
KV_SAVED = Metric(
    name="vllm:reroute_kv_bytes_saved",
    kind=Kind.COUNTER,
    help="Bytes of K/V blocks, on each worker, that image requests would have held besides when "
    "they finished, had every token run all layers.",
)
PREFIX_CACHE = Metric(
    name="vllm:reroute_prefix_cache_tokens",
    kind=Kind.COUNTER,
    help="Number of prompt tokens read from the prefix cache, by reach: in all stages, or in the "
    "first one, whose results do not depend on the question. Their sum is vllm:prefix_cache_hits.",
    labels=("reach",),
    values=lambda schedule: ((ALL_STAGES,), (FIRST_STAGE,)),
)
KV_HELD = Metric(
    name="vllm:reroute_kv_bytes_held",
    kind=Kind.GAUGE,
    help="Bytes of K/V blocks, on each worker, that image requests under way hold; a block that "
    "several of them share counts for each.",
)
KV_DENSE = Metric(
    name="vllm:reroute_kv_bytes_dense",
    kind=Kind.GAUGE,
    help="Bytes of K/V blocks, on each worker, that image requests under way would hold if every "
    "token ran all layers.",
)
IN_CHUNKS = Metric(
    name="vllm:reroute_prompts_in_chunks",
    kind=Kind.GAUGE,
    help="Number of image prompts of which some tokens have run, and not yet all.",
)
PARKED = Metric(
    name="vllm:reroute_parked_bytes",
    kind=Kind.GAUGE,
    help="Bytes of the K/V pool, on each worker, in which states of image prompts wait for their "
    "decisions.",
)

METRICS = (
    REQUESTS,
    SEEN,
    KEPT,
    DEFERRED,
    BROUGHT_BACK,
    KV_ALLOCATED,
    KV_SAVED,
    PREFIX_CACHE,
    KV_HELD,
    KV_DENSE,
    IN_CHUNKS,
    PARKED,
)
