"""How many visual tokens a schedule keeps, and ratios that meet a wanted average."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from vllm_reroute.schedule.published import PUBLISHED_VISUAL_TOKENS, PublishedSchedule

REFERENCE_VISUAL_TOKENS = PUBLISHED_VISUAL_TOKENS
"""Visual tokens of one LLaVA-1.5 image; budgets and averages are stated for it."""

_BISECTION_STEPS = 60

_SEVENTH = 7
"""Nüwa lets seven times as many tokens into the decoder as it keeps from the middle on."""

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


def solve_keep_ratios(
    published: PublishedSchedule, num_layers: int, layers: Sequence[int], average: float
) -> tuple[float, ...]:
    """Keep ratios of the schedule's own shape that average `average` visual tokens per layer.

    average: wanted visual tokens per layer for an image of `REFERENCE_VISUAL_TOKENS`.
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
            f"--reroute-budget {average:g} cannot be met: with decision layers "
            f"{','.join(map(str, layers))} of {num_layers} layers an image of {visual} visual "
            f"tokens can average {lowest:.1f} to {visual}. Choose a value in that range."
        )
    wanted = average * num_layers - sizes[0] * visual
    # High enough for the last ratio to reach 1, where every shape keeps everything.
    low, high = 0.0, _SEVENTH + 1.0 if published.shape == "seventh" else 2.0 ** len(layers)
    for _ in range(_BISECTION_STEPS):
        first = (low + high) / 2
        total = sum(
            n * visual * r for n, r in zip(sizes[1:], _shape(published, first), strict=True)
        )
        low, high = (first, high) if total < wanted else (low, first)
    counts = [max(1, round(visual * r)) for r in _shape(published, high)]
    return tuple(_ratio_for(count) for count in _nudge(counts, sizes[1:], wanted))


def _stage_sizes(num_layers: int, layers: Sequence[int]) -> list[int]:
    edges = [0, *layers, num_layers]
    return [after - before for before, after in itertools.pairwise(edges)]


def _shape(published: PublishedSchedule, first: float) -> list[float]:
    """Ratios whose first one is `first`; beyond 1 the later ones still grow, up to 1 each."""
    stages = range(len(published.layers))
    if published.shape == "geometric":
        ratios = [first ** (i + 1) for i in stages]
    elif published.shape == "halving":
        ratios = [first / 2 ** max(0, i - 1) for i in stages]
    elif published.shape == "seventh":
        ratios = [first / _SEVENTH if i else first for i in stages]
    else:
        ratios = [first for _ in stages]
    return [min(1.0, ratio) for ratio in ratios]


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
