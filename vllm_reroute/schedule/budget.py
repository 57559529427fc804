"""How many visual tokens a schedule keeps, and ratios that meet a wanted average."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from vllm_reroute.schedule.published import PUBLISHED_VISUAL_TOKENS, Schedule
from vllm_reroute.schedule.shapes import first_that_keeps_all

REFERENCE_VISUAL_TOKENS = PUBLISHED_VISUAL_TOKENS
"""Visual tokens of one LLaVA-1.5 image; budgets and averages are stated for it."""

_BISECTION_STEPS = 60

_NUDGES = range(-4, 5)
"""Tokens by which a solved count may move so that the total comes out exactly."""


def num_kept(num_visual: int, keep_ratio: float) -> int:
    """Visual tokens a stage keeps of a request's `num_visual`: int(N * r), at least one.

    0 when the request has no visual tokens. This one function is used by the scheduler and by
    the worker, so both always agree on every length.
    """
    if num_visual == 0:
        return 0
    return max(1, int(num_visual * keep_ratio))


def num_kept_of_images(
    image_sizes: Sequence[int], keep_ratio: float, encoder_ratio: float | None
) -> int:
    """Visual tokens of a request that run in the stages of `keep_ratio`.

    image_sizes: visual tokens of each of its images and videos. encoder_ratio: keep ratio of the
    decision the vision encoder takes, None where it takes none. The encoder sees one image at a
    time, so each image keeps its own share; decoder layers rank all images jointly, among no more
    tokens than the encoder has let through.
    """
    if encoder_ratio is None:
        return num_kept(sum(image_sizes), keep_ratio)
    passed = sum(num_kept(size, encoder_ratio) for size in image_sizes)
    if keep_ratio == encoder_ratio:
        return passed
    return min(passed, num_kept(sum(image_sizes), keep_ratio))


def average_visual_tokens(
    num_layers: int, layers: Sequence[int], keep: Sequence[float], num_visual: int
) -> float:
    """Average number of visual tokens a decoder layer processes for one request."""
    kept = [num_visual, *(num_kept(num_visual, ratio) for ratio in keep)]
    return (
        sum(n * k for n, k in zip(_stage_sizes(num_layers, layers), kept, strict=True)) / num_layers
    )


def tier_keep_ratios(
    schedule: Schedule, num_layers: int, layers: Sequence[int], tier: int
) -> tuple[float, ...]:
    """Keep ratios of a tier: as published, or solved for where the schedule says none.

    Raises ValueError for a tier that its decision layers put out of reach.
    """
    if tier in schedule.keep:
        return tuple(schedule.keep[tier])
    return solve_keep_ratios(schedule, num_layers, layers, tier, option="tier")


def solve_keep_ratios(
    schedule: Schedule,
    num_layers: int,
    layers: Sequence[int],
    average: float,
    option: str = "budget",
) -> tuple[float, ...]:
    """Keep ratios of the schedule's own shape that average `average` visual tokens per layer.

    average: wanted visual tokens per layer for an image of `REFERENCE_VISUAL_TOKENS`. option: that
    asks for it, as the error shall call it.
    Returns one ratio per decision layer. Flat shapes meet the average to half a token. Shapes
    with several different ratios meet it exactly where `average * num_layers` is a whole number,
    unless stage sizes share a divisor or the shape is pressed flat near either end of the range.

    Raises ValueError, naming the reachable range, when no ratios can meet it.
    """
    sizes = _stage_sizes(num_layers, layers)
    visual = REFERENCE_VISUAL_TOKENS
    lowest = (sizes[0] * visual + sum(sizes[1:])) / num_layers
    if not lowest <= average <= visual:
        raise ValueError(
            f"--reroute-{option} {average:g} cannot be met: with decision layers "
            f"{','.join(map(str, layers))} of {num_layers} layers an image of {visual} visual "
            f"tokens can average {lowest:.1f} to {visual}. Choose a value in that range"
            f"{'.' if option == 'budget' else ', with --reroute-budget.'}"
        )
    wanted = average * num_layers - sizes[0] * visual
    low, high = 0.0, first_that_keeps_all(schedule.shape, len(layers))
    for _ in range(_BISECTION_STEPS):
        first = (low + high) / 2
        total = sum(
            n * visual * r for n, r in zip(sizes[1:], _ratios(schedule, first), strict=True)
        )
        low, high = (first, high) if total < wanted else (low, first)
    counts = [max(1, round(visual * r)) for r in _ratios(schedule, high)]
    return tuple(_ratio_for(count) for count in _nudge(counts, sizes[1:], wanted))


def _stage_sizes(num_layers: int, layers: Sequence[int]) -> list[int]:
    edges = [0, *layers, num_layers]
    return [after - before for before, after in itertools.pairwise(edges)]


def _ratios(schedule: Schedule, first: float) -> list[float]:
    """Of all decisions; beyond 1 the first one still moves the others, up to 1 each."""
    return [min(1.0, ratio) for ratio in schedule.shape(first, len(schedule.layers))]


def _nudge(counts: list[int], sizes: Sequence[int], wanted: float) -> list[int]:
    """The counts, moved by as few tokens as bring their total closest to `wanted`.

    Equal counts move together, so that a flat shape stays flat. None overtakes
    another: a stage that may not rise would be cut back to the one before.
    """
    layers_of = {c: sum(n for n, k in zip(sizes, counts, strict=True) if k == c) for c in counts}
    # The count of the fewest layers closes the gap most finely; the others try a few steps.
    *others, last = sorted(layers_of, key=layers_of.__getitem__, reverse=True)
    candidates = []
    for steps in itertools.product(_NUDGES, repeat=len(others)):
        moved = {c: c + step for c, step in zip(others, steps, strict=True)}
        rest = wanted - sum(layers_of[c] * k for c, k in moved.items())
        lowest = max((k for c, k in moved.items() if c < last), default=1)
        highest = min((k for c, k in moved.items() if c > last), default=REFERENCE_VISUAL_TOKENS)
        moved[last] = min(max(lowest, round(rest / layers_of[last])), highest)
        ascending = [moved[c] for c in sorted(moved)]
        if (
            ascending == sorted(ascending)
            and ascending[0] >= 1
            and ascending[-1] <= REFERENCE_VISUAL_TOKENS
        ):
            error = abs(rest - layers_of[last] * moved[last])
            distance = sum(abs(k - c) for c, k in moved.items())
            candidates.append((error, distance, [moved[c] for c in counts]))
    return min(candidates)[2]


def _ratio_for(count: int) -> float:
    """A ratio for which `num_kept` of the reference image is `count`, safe from rounding."""
    return min(1.0, (count + 0.5) / REFERENCE_VISUAL_TOKENS)
