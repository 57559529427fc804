"""Published schedules: exactly as published, at every depth, with their true averages."""

import itertools

import pytest

from vllm_reroute.schedule import RerouteOptions, RoutingSchedule
from vllm_reroute.schedule.published import ACTIONS, SCHEDULES, TIERS, scale_decision_layers

# name, action -> decision layers of 32, of 28, and keep ratios by tier.
PUBLISHED = {
    ("fastv", "remove"): ((3,), (3,), {192: (0.2644,), 128: (0.1418,), 64: (0.01916,)}),
    ("fastv", "reroute"): (
        (3, 7, 15, 23),
        (3, 6, 13, 20),
        {192: (0.2644,) * 4, 128: (0.1418,) * 4, 64: (0.01916,) * 4},
    ),
    ("pdrop", "remove"): (
        (2, 7, 15, 23),
        (2, 6, 13, 20),
        {
            192: (0.5965, 0.3558, 0.2123, 0.1266),
            128: (0.4570, 0.2088, 0.0954, 0.0436),
            64: (0.2789, 0.0937, 0.0315, 0.0106),
        },
    ),
    ("pdrop", "reroute"): (
        (2, 7, 15, 23),
        (2, 6, 13, 20),
        {
            192: (0.4502, 0.4502, 0.2251, 0.1126),
            128: (0.2655, 0.2655, 0.1328, 0.0664),
            64: (0.1392, 0.1392, 0.0696, 0.0348),
        },
    ),
}
METHODS = list(PUBLISHED)
NUWA = [("nuwa", "remove"), ("nuwa", "reroute")]  # see test_nuwa_schedules.py
DEPTHS = range(6, 81)


def resolve(name, action, depth, tier=192) -> RoutingSchedule:
    return RerouteOptions(schedule=name, action=action, tier=tier).resolve(depth)


def test_there_is_nothing_else():
    assert {(name, action) for name, actions in SCHEDULES.items() for action in actions} == set(
        METHODS + NUWA
    )
    assert (ACTIONS, TIERS) == (("reroute", "remove"), (192, 128, 64))


@pytest.mark.parametrize("name,action", METHODS)
@pytest.mark.parametrize("tier", TIERS)
def test_as_published(name, action, tier):
    of_32, of_28, keep = PUBLISHED[name, action]
    for depth, layers in ((32, of_32), (28, of_28)):
        schedule = resolve(name, action, depth, tier)
        assert (schedule.name, schedule.action, schedule.num_layers) == (name, action, depth)
        assert (schedule.layers, schedule.keep) == (layers, keep[tier])


@pytest.mark.parametrize(
    "name,action,depth,averages",
    [
        ("fastv", "remove", 32, (191.8, 127.4, 64.0)),
        ("fastv", "reroute", 32, (191.8, 127.4, 64.0)),
        ("pdrop", "remove", 32, (191.3, 127.6, 80.4)),
        ("pdrop", "reroute", 32, (191.5, 127.4, 84.1)),
        ("fastv", "remove", 28, (197.4, 134.0, 71.5)),
        ("fastv", "reroute", 28, (197.4, 134.0, 71.5)),
        ("pdrop", "remove", 28, (192.2, 129.4, 83.5)),
        ("pdrop", "reroute", 28, (193.4, 130.7, 88.3)),
    ],
)
def test_true_average_of_a_576_token_image(name, action, depth, averages):
    found = tuple(resolve(name, action, depth, tier).average() for tier in TIERS)
    assert found == pytest.approx(averages, abs=0.051)


@pytest.mark.parametrize(
    "name,action,tier,kept",
    [
        ("fastv", "remove", 192, [576, 152]),
        ("fastv", "reroute", 64, [576, 11, 11, 11, 11]),
        ("pdrop", "remove", 64, [576, 160, 53, 18, 6]),
        ("pdrop", "reroute", 192, [576, 259, 259, 129, 64]),
    ],
)
def test_kept_per_stage(name, action, tier, kept):
    assert resolve(name, action, 32, tier).kept_per_stage() == kept


@pytest.mark.parametrize("name,action", METHODS)
def test_any_depth_has_increasing_layers_or_a_clear_refusal(name, action):
    published = SCHEDULES[name][action].layers
    fits = []
    for depth in DEPTHS:
        try:
            layers = resolve(name, action, depth).layers
        except ValueError as error:
            assert f"do not fit a decoder of {depth} layers" in str(error)
            assert "--reroute-layers" in str(error)
            continue
        fits.append(depth)
        assert len(layers) == len(published) and layers[0] == published[0]
        assert all(a < b for a, b in itertools.pairwise((0, *layers, depth)))
    assert fits == list(range(max(6, published[0] + len(published)), 81)), (
        "too shallow or not, never in between"
    )


def test_the_refusal_names_the_depth_that_would_do():
    with pytest.raises(ValueError, match="6 layers: at least 7 are needed"):
        scale_decision_layers((3, 7, 15, 23), 6)
    assert scale_decision_layers((3, 7, 15, 23), 7) == (3, 4, 5, 6)


@pytest.mark.parametrize("name,action", METHODS)
def test_later_layers_scale_with_depth(name, action):
    published = SCHEDULES[name][action].layers
    for depth in range(24, 81):
        assert resolve(name, action, depth).layers[1:] == tuple(
            layer * depth // 32 for layer in published[1:]
        )


@pytest.mark.parametrize("action,keep", [("remove", (0.3, 0.3, 0.2)), ("reroute", (0.3, 0.6, 0.2))])
def test_remove_never_rises_and_reroute_may(action, keep):
    options = RerouteOptions(action=action, layers=(1, 3, 4), keep=(0.3, 0.6, 0.2))
    assert options.resolve(6).keep == keep


def test_stages_partition_the_layers():
    for depth, (name, action) in itertools.product(DEPTHS[4:], METHODS):
        schedule = resolve(name, action, depth)
        stages = schedule.stages
        assert (stages[0].keep_ratio, *(s.keep_ratio for s in stages[1:])) == (1.0, *schedule.keep)
        assert [layer for s in stages for layer in range(s.first_layer, s.end_layer)] == list(
            range(depth)
        )
        for layer in range(depth):
            stage = stages[schedule.stage_of(layer)]
            assert stage.first_layer <= layer < stage.end_layer
        assert schedule.boundary == stages[1].first_layer == schedule.layers[0]


def test_equal_ratios_are_stages_of_their_own():
    """Also a ratio of 1: a stage after a decision is another than the dense one before it."""
    full = RerouteOptions(layers=(1, 2), keep=(1.0, 1.0)).resolve(4)
    assert [(s.first_layer, s.end_layer) for s in full.stages] == [(0, 1), (1, 2), (2, 4)]
    assert [full.stage_of(layer) for layer in range(4)] == [0, 1, 2, 2]
    assert full.kept_per_stage(20) == [20, 20, 20]
