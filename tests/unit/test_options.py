"""What a user may write, and what is refused with option, value, what is allowed, and a cure."""

import json

import pytest

from vllm_reroute.schedule import RerouteOptions, RoutingSchedule

DEPTH = 8

# Options -> words the message must have: the option, the value, what is allowed or the cure.
REFUSED_AT_ONCE = {
    "unknown schedule": (
        {"schedule": "fastvv"},
        ["--reroute-schedule 'fastvv'", "fastv, pdrop, nuwa, none"],
    ),
    "accumulated scores of what is gone": (
        {"schedule": "pdrop", "scorer": "accumulated", "action": "remove"},
        ["--reroute-scorer accumulated", "Allowed: attention, random", "--reroute-action reroute"],
    ),
    "accumulated scores after the encoder's": (
        {"schedule": "nuwa", "scorer": "accumulated"},
        ["--reroute-scorer accumulated", "Allowed: attention", "--reroute-budget"],
    ),
    "history of an unknown kind": (
        {"schedule": "pdrop", "history": "forget"},
        ["--reroute-history 'forget'", "rerank, keep, recall"],
    ),
    "kept turns after the encoder's choice": (
        {"schedule": "nuwa", "history": "keep"},
        ["--reroute-history keep", "nuwa", "Allowed: fastv, pdrop", "--reroute-budget"],
    ),
    "kept turns with accumulated scores": (
        {"schedule": "pdrop", "scorer": "accumulated", "history": "keep"},
        ["--reroute-history keep", "accumulated", "Allowed: attention, random"],
    ),
    "bringing back after the encoder's choice": (
        {"schedule": "nuwa", "history": "recall"},
        ["--reroute-history recall", "nuwa", "Allowed: fastv, pdrop", "--reroute-budget"],
    ),
    "bringing back by accumulated scores": (
        {"schedule": "pdrop", "scorer": "accumulated", "history": "recall"},
        ["--reroute-history recall", "accumulated", "Allowed: attention, random"],
    ),
    "bringing back what is gone": (
        {"schedule": "pdrop", "action": "remove", "history": "recall"},
        [
            "--reroute-history recall",
            "--reroute-action remove",
            "Allowed: rerank, keep",
            "--reroute-action reroute",
        ],
    ),
    "bringing back what one's own lists remove": (
        {"layers": [2], "keep": [0.5], "action": "remove", "history": "recall"},
        ["--reroute-history recall", "--reroute-action remove", "Allowed: rerank, keep"],
    ),
    "bringing back without a schedule": (
        {"history": "recall"},
        ["--reroute-history recall", "--reroute-schedule"],
    ),
    "a marker with accumulated scores": (
        {"schedule": "pdrop", "scorer": "accumulated", "turn_marker": "Bot:"},
        ["--reroute-turn-marker Bot:", "accumulated"],
    ),
    "an empty marker": (
        {"schedule": "pdrop", "history": "keep", "turn_marker": " "},
        ["--reroute-turn-marker ' '", "'ASSISTANT:'"],
    ),
    "a marker without a schedule": (
        {"turn_marker": "Bot:"},
        ["--reroute-turn-marker Bot:", "--reroute-schedule"],
    ),
    "schedule of a wrong type": (
        {"schedule": 3},
        ["--reroute-schedule 3", "fastv, pdrop, nuwa, none"],
    ),
    "schedules in a list": (
        {"schedule": ["pdrop"]},
        ["--reroute-schedule ['pdrop']", "fastv, pdrop, nuwa, none"],
    ),
    "unknown action": (
        {"schedule": "pdrop", "action": "drop"},
        ["--reroute-action 'drop'", "Choose one of: reroute, remove"],
    ),
    "unknown tier": (
        {"schedule": "pdrop", "tier": 100},
        ["--reroute-tier 100", "Choose one of: 192, 128, 64"],
    ),
    "tier of a wrong type": (
        {"schedule": "pdrop", "tier": "big"},
        ["--reroute-tier 'big'", "whole number"],
    ),
    "fractional tier": (
        {"schedule": "pdrop", "tier": 64.5},
        ["--reroute-tier 64.5", "whole number"],
    ),
    "boolean tier": ({"schedule": "pdrop", "tier": True}, ["--reroute-tier True", "whole number"]),
    "endless tier": (
        {"schedule": "pdrop", "tier": float("inf")},
        ["--reroute-tier inf", "whole number"],
    ),
    "budget of a wrong type": (
        {"schedule": "pdrop", "budget": [1]},
        ["--reroute-budget [1]", "a number"],
    ),
    "budget that is no number": (
        {"schedule": "pdrop", "budget": float("nan")},
        ["--reroute-budget nan", "a number"],
    ),
    "tier with budget": (
        {"schedule": "pdrop", "tier": 64, "budget": 90},
        ["--reroute-tier 64", "--reroute-budget 90", "exclude each other", "Give"],
    ),
    "tier with custom lists": (
        {"layers": [2], "keep": [0.5], "tier": 64},
        ["--reroute-tier 64", "--reroute-layers", "--reroute-keep", "Drop one"],
    ),
    "budget with custom lists": (
        {"layers": [2], "keep": [0.5], "budget": 64},
        ["--reroute-budget 64", "--reroute-layers", "--reroute-keep", "Drop one"],
    ),
    "schedule with custom lists": (
        {"layers": [2], "keep": [0.5], "schedule": "pdrop"},
        ["--reroute-schedule pdrop", "--reroute-layers", "--reroute-keep", "Drop one"],
    ),
    "none with custom lists": (
        {"layers": [2], "keep": [0.5], "schedule": "none"},
        ["--reroute-schedule none", "--reroute-layers", "--reroute-keep", "Drop one"],
    ),
    "tier alone": (
        {"tier": 64},
        ["--reroute-tier 64", "Add --reroute-schedule", "fastv, nuwa, pdrop"],
    ),
    "budget alone": (
        {"budget": 64},
        ["--reroute-budget 64", "Add --reroute-schedule", "fastv, nuwa, pdrop"],
    ),
    "action alone": (
        {"action": "remove"},
        ["--reroute-action remove", "Add --reroute-schedule", "fastv, nuwa, pdrop"],
    ),
    "tier of no schedule": (
        {"schedule": "none", "tier": 64},
        ["--reroute-tier 64", "Add --reroute-schedule", "fastv, nuwa, pdrop"],
    ),
    "layers without ratios": ({"layers": [2]}, ["--reroute-layers", "--reroute-keep", "give both"]),
    "ratios without layers": ({"keep": [0.5]}, ["--reroute-layers", "--reroute-keep", "give both"]),
    "unequal lengths": (
        {"layers": [2, 4], "keep": [0.5]},
        [
            "--reroute-layers 2,4",
            "2 decision layers",
            "--reroute-keep has 1 ratios",
            "one ratio per decision layer",
        ],
    ),
    "no layers": ({"layers": [], "keep": []}, ["--reroute-layers is empty", "at least one"]),
    "layers falling": (
        {"layers": [4, 2], "keep": [0.5, 0.5]},
        ["--reroute-layers 4,2", "strictly increasing", "Example: 2,7,15,23"],
    ),
    "layers repeated": (
        {"layers": [2, 2], "keep": [0.5, 0.5]},
        ["--reroute-layers 2,2", "strictly increasing"],
    ),
    "layer 0": (
        {"layers": [0, 2], "keep": [0.5, 0.5]},
        ["--reroute-layers 0,2", "start at 1", "Example"],
    ),
    "negative layer": ({"layers": [-1], "keep": [0.5]}, ["--reroute-layers -1", "start at 1"]),
    "fractional layer": (
        {"layers": [2.5], "keep": [0.5]},
        ["--reroute-layers 2.5", "whole number"],
    ),
    "layer of a wrong type": (
        {"layers": "2,x", "keep": "1,1"},
        ["--reroute-layers 'x'", "whole number"],
    ),
    "layers that are no list": (
        {"layers": 2, "keep": [0.5]},
        ["--reroute-layers 2", "must be a list"],
    ),
    "ratio 0": ({"layers": [2], "keep": [0.0]}, ["--reroute-keep 0", "(0, 1]", "Example"]),
    "negative ratio": ({"layers": [2], "keep": [-0.5]}, ["--reroute-keep -0.5", "(0, 1]"]),
    "ratio above 1": ({"layers": [2, 3], "keep": [0.5, 1.01]}, ["--reroute-keep 1.01", "(0, 1]"]),
    "ratio that is no number": (
        {"layers": [2], "keep": ["half"]},
        ["--reroute-keep 'half'", "a number"],
    ),
    "unknown option": (
        {"schedules": "pdrop"},
        ["'schedules'", "schedule, action, variant, tier, budget, layers, keep"],
    ),
}
REFUSED_FOR_THE_MODEL = {
    "layer at the model's end": (
        {"layers": [2, DEPTH], "keep": [0.5, 0.5]},
        [f"--reroute-layers 2,{DEPTH}", f"{DEPTH} decoder layers", "Lower the last one"],
    ),
    "budget out of reach": (
        {"schedule": "fastv", "budget": 20},
        ["--reroute-budget 20", "can average 216.6 to 576", "Choose a value"],
    ),
}


@pytest.mark.parametrize("given,words", REFUSED_AT_ONCE.values(), ids=REFUSED_AT_ONCE)
def test_refused_before_any_model_is_known(given, words):
    with pytest.raises(ValueError) as refused:
        RerouteOptions.from_mapping(given)
    assert [word for word in words if word not in str(refused.value)] == [], str(refused.value)


@pytest.mark.parametrize("given,words", REFUSED_FOR_THE_MODEL.values(), ids=REFUSED_FOR_THE_MODEL)
def test_refused_at_a_model_s_depth(given, words):
    options = RerouteOptions.from_mapping(given)
    with pytest.raises(ValueError) as refused:
        options.resolve(DEPTH)
    assert [word for word in words if word not in str(refused.value)] == [], str(refused.value)


@pytest.mark.parametrize("given", ["pdrop", ["pdrop"], True, 192])
def test_options_must_be_a_dictionary(given):
    with pytest.raises(ValueError, match="must be a dictionary"):
        RerouteOptions.from_mapping(given)


@pytest.mark.parametrize(
    "layers,keep",
    [
        ([2, 4, 6], [0.5, 0.25, 1.0]),
        ((2, 4, 6), (0.5, 0.25, 1)),
        ("2,4,6", ".5,.25,1"),
        (" 2, 4 ,6,", "0.5, 0.25, 1.0"),
        (["2", "4", "6"], ["0.5", "0.25", "1"]),
        ([2.0, 4.0, 6.0], [0.5, 0.25, 1]),
    ],
)
def test_strings_and_lists_read_alike(layers, keep):
    options = RerouteOptions.from_mapping({"layers": layers, "keep": keep})
    assert options == RerouteOptions(layers=(2, 4, 6), keep=(0.5, 0.25, 1.0))


@pytest.mark.parametrize("tier", [64, "64", 64.0])
@pytest.mark.parametrize("budget", [90.5, "90.5"])
def test_numbers_may_be_text(tier, budget):
    assert RerouteOptions.from_mapping({"schedule": "pdrop", "tier": tier}).tier == 64
    assert RerouteOptions.from_mapping({"schedule": "pdrop", "budget": budget}).budget == 90.5


@pytest.mark.parametrize(
    "given,active",
    [
        ({}, False),
        ({"schedule": None}, False),
        ({"schedule": "none"}, False),
        ({"schedule": "pdrop"}, True),
        ({"layers": "2", "keep": ".5"}, True),
    ],
)
def test_only_a_schedule_or_lists_ask_for_routing(given, active):
    assert RerouteOptions.from_mapping(given).active is active


def test_defaults():
    schedule = RerouteOptions(schedule="pdrop").resolve(32)
    assert schedule == RerouteOptions(schedule="pdrop", action="reroute", tier=192).resolve(32)
    assert RerouteOptions(layers=(2,), keep=(0.5,)).resolve(4).action == "reroute"


@pytest.mark.parametrize(
    "given",
    [
        {"schedule": "pdrop", "action": "remove", "tier": 64},
        {"schedule": "fastv", "budget": 90.5},
        {"layers": [2, 4], "keep": [0.5, 0.7]},
        {},
    ],
)
def test_options_survive_json(given):
    options = RerouteOptions.from_mapping(given)
    assert RerouteOptions.from_mapping(json.loads(json.dumps(options.to_mapping()))) == options


@pytest.mark.parametrize(
    "options",
    [
        RerouteOptions(schedule="pdrop", tier=128),
        RerouteOptions(schedule="fastv", action="remove", budget=200),
        RerouteOptions(action="remove", layers=(1, 3), keep=(0.3, 0.6)),
    ],
)
def test_a_schedule_survives_json(options):
    schedule = options.resolve(DEPTH * 2)
    assert RoutingSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
