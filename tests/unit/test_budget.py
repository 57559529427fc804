"""`--reroute-budget`: the ratios that are solved for really average what was asked."""

import math
import random
from collections import Counter

import pytest

from vllm_reroute.schedule import RerouteOptions
from vllm_reroute.schedule.budget import num_kept
from vllm_reroute.schedule.published import SCHEDULES

VISUAL = 576
FLAT = [("fastv", "remove"), ("fastv", "reroute")]
SHAPED = [("pdrop", "remove"), ("pdrop", "reroute")]
DEPTHS = range(7, 81, 6)


def totals(first_layer):
    """(depth, sum over its layers) that a schedule can reach: both ends and some between."""
    for depth in DEPTHS:
        lowest, highest = first_layer * VISUAL + depth - first_layer, depth * VISUAL
        rng = random.Random(depth)
        between = [rng.randint(lowest, highest) for _ in range(6)]
        for total in (lowest, lowest + 1, highest - 1, highest, *between):
            yield depth, total


def solve(name, action, depth, average):
    return RerouteOptions(schedule=name, action=action, budget=average).resolve(depth)


@pytest.mark.parametrize("name,action", FLAT)
def test_flat_shapes_meet_the_average_to_half_a_token(name, action):
    first_layer = SCHEDULES[name][action].layers[0]
    for depth, total in totals(first_layer):
        schedule = solve(name, action, depth, total / depth)
        assert len(set(schedule.keep)) == 1, "a flat shape stays one KV cache group"
        assert abs(schedule.average() - total / depth) <= 0.5, (depth, total)


@pytest.mark.parametrize("name,action", SHAPED)
def test_other_shapes_meet_the_average_exactly(name, action):
    """Off only where a divisor of the stages' sizes, or a count that cannot move, forbids it."""
    for depth, total in totals(2):
        schedule = solve(name, action, depth, total / depth)
        error = round(abs(schedule.average() * depth - total))
        kept = schedule.kept_per_stage()[1:]
        layers_of = Counter()
        for stage, count in zip(schedule.stages[1:], kept, strict=True):
            layers_of[count] += stage.num_layers
        free = kept[-1] > 1 and kept[0] < VISUAL and len(layers_of) >= 3
        assert error <= (math.gcd(*layers_of.values()) // 2 if free else depth / 2), (
            depth,
            total,
            kept,
        )


@pytest.mark.parametrize("name,action", SHAPED)
def test_llava_1_5_meets_usual_averages_exactly(name, action):
    for average in (64, 80, 96.5, 128, 160.25, 192, 256, 320):
        assert solve(name, action, 32, average).average() == average


@pytest.mark.parametrize(
    "name,action,shape",
    [
        ("fastv", "reroute", lambda first: [first, first, first, first]),
        ("pdrop", "remove", lambda first: [first, first**2, first**3, first**4]),
        ("pdrop", "reroute", lambda first: [first, first, first / 2, first / 4]),
    ],
)
def test_the_schedule_keeps_its_shape(name, action, shape):
    for average in (96, 128, 192, 256):
        keep = solve(name, action, 32, average).keep
        assert keep == pytest.approx(shape(keep[0]), abs=6 / VISUAL)


@pytest.mark.parametrize("name,action", FLAT + SHAPED)
def test_more_budget_never_keeps_less(name, action):
    totals = [
        sum(solve(name, action, 32, average).kept_per_stage()) for average in range(60, 577, 12)
    ]
    assert totals == sorted(totals)


@pytest.mark.parametrize(
    "name,action,lowest", [("fastv", "remove", "54.9"), ("pdrop", "reroute", "36.9")]
)
@pytest.mark.parametrize("average", [0, 20, 576.5, 1e9, -1])
def test_out_of_reach_is_refused_with_the_range(name, action, lowest, average):
    with pytest.raises(ValueError) as refused:
        solve(name, action, 32, average)
    message = str(refused.value)
    assert f"--reroute-budget {average:g}" in message
    assert f"average {lowest} to 576" in message and "Choose a value in that range" in message


@pytest.mark.parametrize("name,action", FLAT + SHAPED)
def test_both_ends_of_the_range_are_reachable(name, action):
    first = SCHEDULES[name][action].layers[0]
    assert set(solve(name, action, 32, VISUAL).kept_per_stage()) == {VISUAL}
    lowest = solve(name, action, 32, (first * VISUAL + 32 - first) / 32)
    assert set(lowest.kept_per_stage()[1:]) == {1}


@pytest.mark.parametrize(
    "num_visual,keep_ratio,expect",
    [
        (576, 1.0, 576),
        (576, 0.2644, 152),
        (576, 0.01916, 11),
        (576, 0.0106, 6),
        (576, 0.0001, 1),
        (1152, 0.2644, 304),
        (1, 0.5, 1),
        (3, 0.999, 2),
        (0, 0.5, 0),
        (0, 1.0, 0),
    ],
)
def test_num_kept(num_visual, keep_ratio, expect):
    assert num_kept(num_visual, keep_ratio) == expect


def test_a_solved_ratio_keeps_the_solved_count():
    """A ratio below 1 sits in the middle of its token, so no rounding moves the count."""
    for average in range(56, 576, 5):
        schedule = solve("fastv", "remove", 32, average)
        ratio, count = schedule.keep[0], schedule.kept_per_stage()[1]
        assert ratio < 1
        assert {num_kept(VISUAL, ratio * (1 + nudge)) for nudge in (-1e-7, 0.0, 1e-7)} == {count}
