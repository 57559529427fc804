"""How counts travel from a scheduler to a front end.

`SchedulerStats` has no field for counts of a model's or a scheduler's own, and front ends decode that
very class, so that a subclass would arrive without what it adds. One of its fields maps names to
numbers and is empty in every routed engine, which refuses LoRA: the running requests per adapter.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm.v1.metrics.stats import SchedulerStats


def send(stats: SchedulerStats, counts: Mapping[str, int]) -> None:
    """Let counts, by series, travel with a scheduler's statistics."""
    stats.running_lora_adapters.update(counts)


def counts_of(stats: SchedulerStats) -> Mapping[str, int]:
    """Counts by series; none from a scheduler that has sent none."""
    return stats.running_lora_adapters
