"""Calibration's solvers: against every schedule there is, one by one."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from vllm_reroute.calibration.choice import Wish, choose
from vllm_reroute.calibration.confidence import expectations, held_out, recurrence
from vllm_reroute.calibration.grid import coarse_counts, finer_counts, stage_losses
from vllm_reroute.calibration.objective import Looks, lost, share_lost
from vllm_reroute.calibration.removal_solver import solve_removal
from vllm_reroute.calibration.reroute_solver import Tails
from vllm_reroute.schedule.routing_schedule import RoutingSchedule

LAYERS, VISUAL = 7, 6


def made_up(seed, samples=3, layers=LAYERS, visual=VISUAL, first_layer=1, objective="attention"):
    """Rows with a few tokens that stand out, others at other depths."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(samples):
        attention = rng.dirichlet(np.full(visual, 0.4), size=layers)
        attention *= rng.uniform(0.2, 1.0, size=(layers, 1))
        contribution = attention * rng.uniform(0.1, 3.0, size=attention.shape)
        rows.append({"attention": attention, "contribution": contribution})
    return Looks.of(rows, objective, first_layer)


def wish(**changes):
    given = {
        "share": 0.5, "first_layer": 1, "most_decisions": 3, "action": "reroute", "monotone": False,
    }  # fmt: skip
    return Wish(**{**given, **changes})


def every_schedule(problem, action, monotone):
    """All within the tokens."""
    depth, first = problem.num_layers, problem.first_layer
    for number in range(1, problem.most_decisions + 1):
        for layers in itertools.combinations(range(first, depth), number):
            lengths = np.diff([*layers, depth])
            for counts in itertools.product(problem.counts, repeat=number):
                tokens = layers[0] * problem.reference + int(lengths @ np.array(counts))
                falling = all(b <= a for a, b in itertools.pairwise(counts))
                if tokens <= problem.tokens and (falling or not (monotone or action == "remove")):
                    yield RoutingSchedule(
                        name="x",
                        action=action,
                        num_layers=depth,
                        layers=layers,
                        keep=replace(problem, counts=counts).ratios,
                    )


def least(looks, wished, monotone=None):
    problem = wished.problem(looks)
    monotone = wished.monotone if monotone is None else monotone
    schedules = every_schedule(problem, wished.action, monotone)
    return min(float(lost(looks, s).sum()) for s in schedules)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.3, 0.55])
@pytest.mark.parametrize("monotone", [False, True])
def test_reroute_equals_brute_force(seed, share, monotone):
    looks = made_up(seed)
    wished = wish(share=share, monotone=monotone)
    chosen = choose(looks, wished)
    assert float(lost(looks, chosen).sum()) == pytest.approx(least(looks, wished), rel=1e-5)
    assert chosen.average(VISUAL) <= share * VISUAL + 1e-9
    if monotone:
        assert list(chosen.keep) == sorted(chosen.keep, reverse=True)


def test_monotone_is_a_bound_that_bites():
    """Somewhere the best schedule rises, or the two modes would be one."""
    pairs = [
        (choose(made_up(s), wish()), choose(made_up(s), wish(monotone=True))) for s in range(6)
    ]
    assert any(list(free.keep) != sorted(free.keep, reverse=True) for free, _ in pairs)
    for seed, (free, falling) in enumerate(pairs):
        looks = made_up(seed)
        assert lost(looks, free).sum() <= lost(looks, falling).sum() * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [1, 2, 3])
def test_removal_equals_brute_force_here(seed, most):
    """With one decision the search is complete; with more it need not be, but on small problems is."""
    looks = made_up(seed)
    wished = wish(share=0.5, action="remove", most_decisions=most)
    chosen = choose(looks, wished)
    assert float(lost(looks, chosen).sum()) == pytest.approx(least(looks, wished), rel=1e-5)
    assert list(chosen.keep) == sorted(chosen.keep, reverse=True)


@pytest.mark.parametrize("beam", [1, 4])
def test_what_removal_is_said_to_lose_is_what_it_loses(beam):
    """However narrow the beam; and earlier removals count."""
    looks = made_up(11, layers=9, visual=9)
    problem = wish(share=0.45, action="remove").problem(looks)
    losses = stage_losses(looks, problem).mean(axis=0)
    found = solve_removal(looks, losses, problem, beam)
    assert len(found.layers) > 1
    keep = replace(problem, counts=found.counts).ratios
    schedule = RoutingSchedule(
        name="x", action="remove", num_layers=9, layers=found.layers, keep=keep
    )
    assert found.loss * len(looks.sizes) == pytest.approx(lost(looks, schedule).sum(), rel=1e-6)
    free = replace(schedule, action="reroute")
    assert lost(looks, schedule).sum() != pytest.approx(lost(looks, free).sum(), rel=1e-3)


@pytest.mark.parametrize("first_layer", [1, 3])
def test_no_decision_before_the_first_allowed_layer(first_layer):
    looks = made_up(3, first_layer=first_layer)
    wished = wish(share=0.7, first_layer=first_layer, most_decisions=2)
    chosen = choose(looks, wished)
    assert chosen.layers[0] >= first_layer
    assert float(lost(looks, chosen).sum()) == pytest.approx(least(looks, wished), rel=1e-5)


def test_dense_layers_have_nothing_to_lose():
    looks = made_up(3, first_layer=3)
    assert looks.totals[:, :3].sum() == 0 and (looks.totals[:, 3:] > 0).all()


def test_a_budget_below_the_lowest_is_refused_with_it():
    looks = made_up(0)
    lowest = (2 * VISUAL + LAYERS - 2) / (VISUAL * LAYERS)
    with pytest.raises(ValueError, match=rf"--budget 40.0%.*layer 2 of 7.*{lowest:.1%}"):
        choose(looks, wish(share=0.4, first_layer=2))
    exact = choose(looks, wish(share=lowest, first_layer=2))
    assert (exact.layers[0], exact.kept_per_stage(VISUAL)[1]) == (2, 1)


def test_one_more_decision_never_loses_more():
    looks = made_up(5)
    losses = [lost(looks, choose(looks, wish(most_decisions=most))).sum() for most in (1, 2, 3, 4)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[2]


def test_a_tail_is_what_its_schedules_lose():
    """The table removal is guided by: least loss from a layer on, for every budget."""
    looks = made_up(2)
    problem = wish(monotone=True).problem(looks)
    losses = stage_losses(looks, problem).mean(axis=0)
    tails = Tails(losses, problem, monotone=True)
    index, layer, tokens = 3, 4, 7
    within = [losses[4, 4:, i].sum() for i in range(index + 1) if 3 * problem.counts[i] <= tokens]
    for end, i, j in itertools.product((5, 6), range(index + 1), range(index + 1)):
        spent = (end - 4) * problem.counts[i] + (LAYERS - end) * problem.counts[j]
        if j <= i and spent <= tokens:
            within.append(losses[4, 4:end, i].sum() + losses[end, end:, j].sum())
    assert tails.at(2, layer)[index, tokens] == pytest.approx(min(within), rel=1e-5)


def test_counts_are_all_of_the_small_and_a_few_of_the_large():
    counts = coarse_counts(576)
    assert counts[:32] == tuple(range(1, 33)) and counts[-1] == 576
    assert max(b / a for a, b in itertools.pairwise(counts[31:])) < 1.041
    assert coarse_counts(5) == (1, 2, 3, 4, 5)
    finer = finer_counts(counts, [400], 576)
    assert set(range(384, 417)) <= set(finer) and set(counts) <= set(finer)


def test_samples_of_other_sizes_keep_shares():
    """Counts are the reference image's; every sample keeps its own share, as the engine does."""
    rng = np.random.default_rng(0)
    rows = [
        {name: rng.dirichlet(np.ones(size), size=LAYERS) for name in ("attention", "contribution")}
        for size in (4, 11)
    ]
    looks = Looks.of(rows, "attention", 1)
    assert looks.reference == 576
    half = RoutingSchedule(name="x", action="reroute", num_layers=LAYERS, layers=(2,), keep=(0.5,))
    loss = lost(looks, half)
    for sample, (row, kept) in enumerate(zip(rows, (2, 5), strict=True)):
        order = np.argsort(-row["attention"][2], kind="stable")
        expect = row["attention"][2:, order[kept:]].sum(axis=1)
        assert loss[sample, 2:] == pytest.approx(expect, rel=1e-5)
    assert (loss[:, :2] == 0).all()


ROW = {
    "attention": np.array([[0.0, 0.0], [0.6, 0.4], [0.9, 0.1]]),
    "contribution": np.array([[9.0, 9.0], [1.0, 5.0], [2.0, 3.0]]),
    "change": np.array([[1.0, 1.0], [0.1, 0.5], [0.7, 0.7]]),
}


@pytest.mark.parametrize(
    "objective,worth",
    [
        ("attention", [0.4, 0.1]),
        ("contribution", [5.0, 3.0]),
        # Half of what it adds later, since the layer changes it by half.
        ("lasting", [5.0 + 0.5 * 3.0, 3.0]),
    ],
)
def test_objectives_weigh_what_was_recorded(objective, worth):
    looks = Looks.of([ROW] * 4, objective, 1)
    schedule = RoutingSchedule(name="x", action="reroute", num_layers=3, layers=(1,), keep=(0.5,))
    # Ranked by attention, whatever a token is worth.
    assert lost(looks, schedule)[0] == pytest.approx([0, *worth])


def test_expectations_compare_with_the_chosen_one():
    looks = made_up(4, samples=30)
    chosen = choose(looks, wish())
    worse = RoutingSchedule(
        name="y", action="remove", num_layers=LAYERS, layers=(1,), keep=(1.5 / VISUAL,)
    )
    expected = expectations(looks, {"chosen": chosen, "worse": worse})
    assert expected["chosen"].share == pytest.approx(share_lost(lost(looks, chosen), looks.totals))
    assert expected["chosen"].difference == 0
    low, high = expected["worse"].difference_interval
    assert 0 < low < expected["worse"].difference < high
    low, high = expected["chosen"].interval
    assert low < expected["chosen"].share < high


def test_the_other_half_never_chooses_better_than_ones_own():
    looks = made_up(4, samples=8)
    halves = held_out(looks, wish())
    assert len(halves) == 2
    assert all(half.other >= half.own - 1e-6 for half in halves)
    assert any(half.other > half.own + 1e-6 for half in halves)


def test_recurrence_tells_a_sure_layer_from_a_chance_one():
    """All attention moves to other tokens at layer 4, in every sample."""
    rows = []
    for sample in range(8):
        attention = np.full((9, 8), 0.01)
        attention[1:4, sample % 8] = attention[4:, (sample + 3) % 8] = 1.0
        rows.append({"attention": attention, "contribution": attention})
    looks = Looks.of(rows, "attention", 1)
    wished = wish(share=0.25, most_decisions=2)
    chosen = choose(looks, wished)
    assert chosen.layers == (1, 4)
    ticks = []
    seen = recurrence(looks, wished, chosen, lambda: ticks.append(1))
    assert seen == {1: 1.0, 4: 1.0} and len(ticks) == 20
    elsewhere = replace(chosen, layers=(1, 7))
    assert recurrence(looks, wished, elsewhere, lambda: None) == {1: 1.0, 7: 0.0}
