"""Configurations of the quality harness: matched averages, and what to say where a budget cannot be met."""

import math
from dataclasses import replace

import pytest

from benchmarks.local_model import SHAPES, build_local_model
from benchmarks.quality.__main__ import parse_arguments, planned
from benchmarks.quality.methods import (
    CALIBRATED,
    METHODS,
    Configuration,
    Routing,
    configurations,
    downsampled,
    routed,
    server_flags,
)
from benchmarks.quality.model_shape import DEFAULT_MODEL, ModelShape
from benchmarks.quality.serving import check_average
from vllm_reroute.schedule import RerouteOptions
from vllm_reroute.schedule.published import scale_decision_layers

SMALL = ModelShape(visual_tokens=144, decoder_layers=12, image_token=4, kv_bytes=1024)
LARGE = ModelShape(visual_tokens=576, decoder_layers=32, image_token=4, kv_bytes=1024)
ROUTED = [name for name, routing in METHODS.items() if isinstance(routing, Routing)]
PUBLISHED = [name for name in METHODS if name not in CALIBRATED]


def served_average(configuration: Configuration, shape: ModelShape) -> float:
    """What the server's own options code makes of the flags."""
    words = dict(zip(configuration.arguments[::2], configuration.arguments[1::2], strict=True))
    words.pop("--reroute-scorer", None)
    given = {name.removeprefix("--reroute-"): value for name, value in words.items()}
    options = RerouteOptions.from_mapping(given)
    return options.resolve(shape.decoder_layers).average(shape.visual_tokens)


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("budget", [0.33, 0.22, 0.11])
def test_averages_match_the_budget_and_the_flags(name, budget):
    found = routed(name, budget, SMALL)
    # One token more or less in all layers after the first decision is the finest flat schedules can do.
    assert found.average == pytest.approx(budget * 144, abs=0.5)
    assert served_average(found, SMALL) == found.average


@pytest.mark.parametrize("budget", [0.33, 0.22, 0.11, 0.05])
@pytest.mark.parametrize("schedule", ["fastv", "pdrop"])
def test_remove_and_reroute_are_matched(schedule, budget):
    remove, reroute = (
        routed(f"{schedule} {action}", budget, SMALL) for action in ("remove", "reroute")
    )
    assert remove.average == pytest.approx(reroute.average, abs=0.25)
    assert remove.decision_layers == reroute.decision_layers[: len(remove.decision_layers)]


def test_published_layers_are_kept_where_they_reach_the_budget():
    found = routed("fastv reroute", 0.22, LARGE)
    assert found.decision_layers == (3, 7, 15, 23)
    assert found.kept == (576, 80, 80, 80, 80)
    assert "published" in found.note
    assert found.arguments[:4] == ("--reroute-schedule", "fastv", "--reroute-action", "reroute")


def test_a_first_layer_of_its_own_keeps_the_other_layers_the_shape_and_the_average():
    found = routed("pdrop reroute from 3", 0.22, LARGE)
    assert found.decision_layers == (3, 7, 15, 23)
    first, second, third, fourth = found.kept[1:]
    assert first == second and third == pytest.approx(first / 2, abs=1) and fourth < third
    assert found.average == pytest.approx(routed("pdrop reroute", 0.22, LARGE).average, abs=0.25)
    assert "but for the first, 3" in found.note
    assert served_average(found, LARGE) == found.average


def test_first_decision_moves_where_dense_layers_alone_exceed_the_budget():
    found = routed("fastv reroute", 0.22, SMALL)
    assert found.decision_layers == scale_decision_layers((1, 7, 15, 23), 12)
    assert "moved to layer 1" in found.note and "3 dense layers of 12" in found.note
    # The shape stays: flat.
    assert len(set(found.kept[1:])) == 1


@pytest.mark.parametrize("name", [name for name in ROUTED if METHODS[name].schedule != "nuwa"])
def test_an_unreachable_budget_is_named_and_the_lowest_average_shown(name):
    found = routed(name, 0.05, SMALL)
    assert "5% is not reachable" in found.note and "8.3%" in found.note
    assert found.decision_layers[0] == 1 and set(found.kept[1:]) == {1}
    assert found.average == (144 + 11) / 12
    assert served_average(found, SMALL) == found.average


def test_random_keeps_as_many_tokens_as_fastv_remove():
    for budget in (0.33, 0.11, 0.05):
        random, fastv = routed("random", budget, SMALL), routed("fastv remove", budget, SMALL)
        assert random.arguments == (*fastv.arguments, "--reroute-scorer", "random")
        assert random.kept == fastv.kept


@pytest.mark.parametrize(
    ("budget", "grid"), [(0.33, 7), (0.22, 6), (0.11, 4), (0.05, 3), (0.001, 1), (0.999, 12)]
)
def test_downsampling_takes_the_nearest_square(budget, grid):
    found = downsampled(budget, SMALL)
    assert found.average == grid * grid and found.grid == grid
    wanted = budget * 144
    assert abs(grid**2 - wanted) == min(abs(g * g - wanted) for g in range(1, 13))


def test_every_configuration_has_a_name_of_its_own():
    plan = configurations(PUBLISHED, (0.33, 0.22, 0.11, 0.05), SMALL)
    names = [each.name for each in plan]
    assert len(set(names)) == len(names) == 1 + 4 * (len(PUBLISHED) - 1)
    assert names.count("dense") == 1 and "fastv-reroute-33" in names


def test_what_is_named_twice_is_asked_once():
    plan = configurations(["downsample", "dense", "downsample"], (0.33, 0.33), SMALL)
    assert [each.name for each in plan] == ["downsample-33", "dense"]


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("budget", [0.33, 0.22, 0.11, 0.05])
def test_calibrated_schedules_are_those_of_their_files(name, budget):
    ours = ModelShape.of(DEFAULT_MODEL)
    (found,) = configurations([name], (budget,), ours)
    kind = METHODS[name]
    assert budget * 144 - 1 < found.average <= budget * 144
    assert served_average(found, ours) == found.average
    assert len(found.decision_layers) <= kind.most_decisions
    assert found.kept[0] == 144
    if kind.monotone or kind.action == "remove":
        assert list(found.kept) == sorted(found.kept, reverse=True)
    assert ("remove" in found.arguments) == (kind.action == "remove")


def test_calibrated_schedules_are_for_their_model_and_budgets_only():
    ours = ModelShape.of(DEFAULT_MODEL)
    with pytest.raises(ValueError, match=r"--budgets 40 has no schedule of 'calibrated reroute'"):
        configurations(["calibrated reroute"], (0.4,), ours)
    other = replace(ours, identity=replace(ours.identity, name="other"))
    with pytest.raises(ValueError, match="calibrated on another model"):
        configurations(["calibrated reroute"], (0.22,), other)


def test_by_default_only_the_grounding_model_gets_its_calibrated_rows(tmp_path):
    plan = planned(parse_arguments(["--budgets", "33"]))[2]
    assert {each.method for each in plan} == set(METHODS)
    other = build_local_model(tmp_path / "tiny", SHAPES["tiny"])
    plan = planned(parse_arguments(["--model", str(other), "--budgets", "33"]))[2]
    assert {each.method for each in plan} == set(PUBLISHED)


def test_unknown_methods_and_budgets_are_refused():
    with pytest.raises(ValueError, match=r"--only 'best' is unknown.*fastv remove"):
        configurations(["best"], (0.33,), SMALL)
    with pytest.raises(ValueError, match=r"--budgets 120 must lie between"):
        configurations(["dense"], (1.2,), SMALL)


def test_flags_survive_the_command_line_exactly():
    options = RerouteOptions(layers=(1, 5), keep=(1 / 3, 0.1), action="remove")
    flags = server_flags(options)
    assert flags[flags.index("--reroute-keep") + 1] == f"{1 / 3!r},0.1"


FASTV = Configuration(
    method="fastv remove",
    budget=0.33,
    average=47.25,
    grid=12,
    decision_layers=(3,),
    kept=(144, 15),
)
DENSE = Configuration(method="dense", budget=None, average=144, grid=12, kept=(144,))


def printed(average: str, visual: int = 144) -> str:
    return f"INFO x\n  visual tokens     {average} per layer on average, of {visual}\n"


@pytest.mark.parametrize("average", ["47.2", "47.3"])
def test_a_server_that_prints_the_average_is_accepted(average):
    check_average(FASTV, 144, printed(average))
    check_average(DENSE, 144, "INFO started")


@pytest.mark.parametrize(
    ("configuration", "counted", "log"),
    [
        (FASTV, 144, printed("47.4")),
        (FASTV, 144, printed("47.2", 576)),
        (FASTV, 144, "INFO started"),
        (FASTV, 576, printed("47.2")),
        (DENSE, 36, "INFO started"),
        (DENSE, 144, printed("144.0")),
    ],
)
def test_a_server_that_does_something_else_is_not(configuration, counted, log):
    with pytest.raises(RuntimeError):
        check_average(configuration, counted, log)


def test_a_grid_is_the_side_of_the_models():
    assert configurations(["dense"], (), LARGE)[0].grid == math.isqrt(576)
