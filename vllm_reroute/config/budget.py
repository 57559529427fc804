"""How many visual tokens a schedule keeps, and ratios that meet a wanted average."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from vllm_reroute.config.schedules import PublishedSchedule

REFERENCE_VISUAL_TOKENS = 576
"""Visual tokens of one LLaVA-1.5 image; budgets and averages are stated for it."""

_BISECTION_STEPS = 60


def num_kept(num_visual: int, keep_ratio: float) -> int:
    """Visual tokens a stage keeps of a request's `num_visual`: int(N * r), at least one.

    0 when the request has no visual tokens. This one function is used by the scheduler and by
    the worker, so both always agree on every length.
    """
    if num_visual == 0:
        return 0
    return max(1, int(num_visual * keep_ratio))


def average_visual_tokens(
    num_layers: int, layers: Sequence[int], keep: Sequence[float], num_visual: int
) -> float:
    """Average number of visual tokens a decoder layer processes for one request."""
    kept = [num_visual, *(num_kept(num_visual, ratio) for ratio in keep)]
    return sum(n * k for n, k in zip(_stage_sizes(num_layers, layers), kept, strict=True)) / num_layers


def solve_keep_ratios(
    published: PublishedSchedule, num_layers: int, layers: Sequence[int], average: float
) -> tuple[float, ...]:
    """Keep ratios of the schedule's own shape that average `average` visual tokens per layer.

    average: wanted visual tokens per layer for an image of `REFERENCE_VISUAL_TOKENS`.
    Returns one ratio per decision layer. Shapes with several different ratios meet the average
    exactly where `average * num_layers` is a whole number; flat shapes to half a token.

    Raises ValueError, naming the reachable range, when no ratios can meet it.
    """
    sizes = _stage_sizes(num_layers, layers)
    visual = REFERENCE_VISUAL_TOKENS
    lowest = (sizes[0] * visual + sum(sizes[1:])) / num_layers
    if not lowest <= average <= visual:
        raise ValueError(
            f"--reroute-budget {average:g} cannot be met: with decision layers "
            f"{','.join(map(str, layers))} of {num_layers} layers an image of {visual} visual "
            f"tokens can average {lowest:.1f} to {visual}. Choose a value in that range."
        )
    wanted = average * num_layers - sizes[0] * visual
    low, high = 0.0, 1.0
    for _ in range(_BISECTION_STEPS):
        first = (low + high) / 2
        total = sum(n * visual * r for n, r in zip(sizes[1:], _shape(published, first), strict=True))
        low, high = (first, high) if total < wanted else (low, first)
    counts = [max(1, round(visual * r)) for r in _shape(published, high)]
    return tuple(_ratio_for(count) for count in _nudge(counts, sizes[1:], wanted))


def _stage_sizes(num_layers: int, layers: Sequence[int]) -> list[int]:
    edges = [0, *layers, num_layers]
    return [after - before for before, after in itertools.pairwise(edges)]


def _shape(published: PublishedSchedule, first: float) -> list[float]:
    stages = range(len(published.layers))
    if published.shape == "geometric":
        return [first ** (i + 1) for i in stages]
    if published.shape == "halving":
        return [first / 2 ** max(0, i - 1) for i in stages]
    return [first for _ in stages]


def _nudge(counts: list[int], sizes: Sequence[int], wanted: float) -> list[int]:
    """The counts, moved by at most two tokens a distinct count, closest to `wanted` in total.

    Equal counts move together: stages with equal ratios share one KV cache group.
    """
    distinct = sorted(set(counts))

    def moved(steps: Sequence[int]) -> list[int]:
        by_count = dict(zip(distinct, steps, strict=True))
        return [c + by_count[c] for c in counts]

    candidates = (
        moved(steps) for steps in itertools.product((0, 1, -1, 2, -2), repeat=len(distinct))
    )
    allowed = [c for c in candidates if 1 <= min(c) and max(c) <= REFERENCE_VISUAL_TOKENS]
    return min(
        allowed,
        key=lambda c: (
            abs(sum(n * k for n, k in zip(sizes, c, strict=True)) - wanted),
            sum(abs(a - b) for a, b in zip(c, counts, strict=True)),
        ),
    )


def _ratio_for(count: int) -> float:
    """A ratio for which `num_kept` of the reference image is `count`, safe from rounding."""
    return min(1.0, (count + 0.5) / REFERENCE_VISUAL_TOKENS)
