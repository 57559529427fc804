"""What the benchmark suite computes from times: spreads, paired ratios, limits, targets."""

import pytest

from benchmarks.bench import targets
from benchmarks.bench.limits import StockParts, product_ratio
from benchmarks.bench.parts import machinery
from benchmarks.bench.spread import Spread, paired, shown
from vllm_reroute.schedule import RerouteOptions


def test_median_and_range():
    spread = Spread.of([3.0, 1.0, 2.0, 10.0])
    assert spread.as_row() == {"median": 2.5, "low": 1.0, "high": 10.0, "count": 4}
    assert shown(spread.as_row(), 1000, 0) == "2,500 (1,000 to 10,000)"
    with pytest.raises(ValueError, match="spread of nothing"):
        Spread.of([])


def test_ratios_are_formed_within_a_round():
    """A machine that slows down tenfold changes every time and no ratio."""
    stock, routed = [1.0, 10.0, 1.0], [0.5, 5.0, 0.5]
    assert paired(stock, routed) == [2, 2, 2]
    with pytest.raises(ValueError):
        paired(stock, routed[:2])


def test_fixed_time_by_hand():
    # 0.3 s whatever the depth, 0.1 s a layer.
    parts = StockParts(dense_s=3.5, depth=32, shallow_s=0.5, shallow_depth=2)
    assert parts.per_layer_s == pytest.approx(0.1) and parts.fixed_s == pytest.approx(0.3)
    # A quarter of 3.2 s is left, and all of 0.3 s.
    assert parts.speed_up_limit(0.25) == pytest.approx(3.5 / 1.1)
    assert parts.speed_up_limit(1.0) == pytest.approx(1.0)


def test_without_fixed_time_the_limit_is_the_ratio_of_products():
    parts = StockParts(dense_s=3.2, depth=32, shallow_s=0.2, shallow_depth=2)
    assert parts.speed_up_limit(0.2) == pytest.approx(5.0)
    noisy = StockParts(dense_s=3.3, depth=32, shallow_s=0.1, shallow_depth=2)
    assert noisy.fixed_s == 0


def test_products_count_text():
    schedule = RerouteOptions(schedule="fastv", tier=192).resolve(32)
    average = (3 * 576 + 29 * 152) / 32
    assert product_ratio(schedule, 576, 104) == pytest.approx((104 + average) / 680)
    assert product_ratio(schedule, 576, 104) > product_ratio(schedule, 576, 1)


@pytest.mark.parametrize(
    "row,met",
    [
        (targets.at_least("x", 0.92, 0.92), True),
        (targets.at_least("x", 0.9199, 0.92), False),
        (targets.at_most("x", 1.03, 1.03), True),
        (targets.at_most("x", 1.0301, 1.03), False),
    ],
)
def test_bounds_belong_to_the_target(row, met):
    assert row["met"] is met
    line = list(targets.table([row]))[-1]
    assert ("missed" not in line) is met and f"{row['bound']:g}" in line


@pytest.mark.parametrize("groups", [2, 5, 8, 12])
@pytest.mark.parametrize("depth,visual", [(32, 576), (28, 576), (32, 64)])
def test_nothing_saved_takes_that_many_groups(groups, depth, visual):
    options = machinery.keep_nearly_all(groups, depth, visual)
    schedule = RerouteOptions.from_mapping(options).resolve(depth)
    assert len(schedule.stages) == groups
    assert schedule.stages[0].num_layers == 1
    assert schedule.kept_per_stage(visual) == [visual] + [visual - 1] * (groups - 1)


def test_more_groups_than_layers_are_refused():
    with pytest.raises(ValueError, match="12 KV groups need more than 8"):
        machinery.keep_nearly_all(12, 8, 64)
