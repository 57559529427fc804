"""What a request may choose for itself, in both spellings, and what it is told otherwise."""

import re
from dataclasses import replace

import pytest

from vllm_reroute.schedule import RerouteOptions
from vllm_reroute.schedule.published import HISTORIES
from vllm_reroute.schedule.request_options import RequestOptions

PDROP = RerouteOptions(schedule="pdrop").resolve(32)
REMOVE = RerouteOptions(schedule="pdrop", action="remove").resolve(32)
OWN = RerouteOptions(layers=(2, 5), keep=(0.5, 0.25)).resolve(8)
NUWA = RerouteOptions(schedule="nuwa").resolve(32)
KEEP = (0.4, 0.3, 0.2, 0.1)


def both_spellings(options):
    return [{"reroute": options}, {f"reroute_{name}": value for name, value in options.items()}]


@pytest.mark.parametrize("extra_args", [None, {}, {"session_id": "x"}, {"reroute": {}}])
def test_a_request_that_says_nothing_gets_what_the_engine_does(extra_args):
    assert RequestOptions.of(extra_args) is None


@pytest.mark.parametrize(
    "options,schedule,keep",
    [
        ({"tier": 64}, PDROP, RerouteOptions(schedule="pdrop", tier=64).resolve(32).keep),
        ({"tier": 64.0}, PDROP, RerouteOptions(schedule="pdrop", tier=64).resolve(32).keep),
        ({"budget": 100}, PDROP, RerouteOptions(schedule="pdrop", budget=100).resolve(32).keep),
        ({"keep": list(KEEP)}, PDROP, KEEP),
        ({"keep": ".4,.3,.2,.1"}, PDROP, KEEP),
        ({"schedule": "none"}, PDROP, (1.0,) * 4),
        ({"schedule": "pdrop", "tier": 128}, PDROP, (0.2655, 0.2655, 0.1328, 0.0664)),
        ({"schedule": "pdrop"}, PDROP, PDROP.keep),
        ({"keep": [0.2, 0.8]}, OWN, (0.2, 0.8)),
        ({"explain": "scores"}, PDROP, PDROP.keep),
        ({"schedule": "none"}, OWN, (1.0, 1.0)),
        # What has been removed does not come back.
        ({"keep": [0.2, 0.8, 0.1, 0.5]}, REMOVE, (0.2, 0.2, 0.1, 0.1)),
    ],
)
def test_both_spellings_choose_alike(options, schedule, keep):
    for extra_args in both_spellings(options):
        assert RequestOptions.of(extra_args).keep_ratios(schedule) == pytest.approx(keep)


@pytest.mark.parametrize(
    "options,schedule,told",
    [
        ({"history": "forget"}, PDROP, "'forget' is unknown. Choose one of: rerank, keep, recall"),
        ({"history": "keep"}, PDROP, "'keep' needs a server.*Allowed: 'rerank'.*turn-marker"),
        ({"history": "keep"}, NUWA, "'keep' needs a server"),
        (
            {"history": "recall"},
            PDROP,
            "'recall' needs a server.*Allowed: 'rerank'.*--reroute-history recall, or.*turn-marker",
        ),
        ({"history": "recall"}, NUWA, "'recall' needs a server"),
        (
            {"history": "recall"},
            replace(REMOVE, marker=(8, 9)),
            "'recall' brings back.*'remove'.*Allowed: 'rerank', 'keep'.*--reroute-action reroute",
        ),
        (
            {"action": "remove"},
            PDROP,
            "'action'.*cannot be chosen by a request. Allowed: tier, budget",
        ),
        ({"layers": [2, 5]}, PDROP, "'layers'.*Allowed"),
        ({"explain": "all"}, PDROP, "reroute_explain 'all'.*Allowed: true.*'scores'.*Leave it out"),
        ({"explain": 2}, PDROP, "reroute_explain 2 is unknown"),
        ({"explain": ["scores"]}, PDROP, "is unknown"),
        ({"explain": True, "tier": 64}, NUWA, "the vision encoder decides first"),
        ({"tier": 0}, NUWA, "the vision encoder decides first"),
        ({"typo": 1}, PDROP, "'typo'.*Allowed"),
        ({"schedule": "fastv"}, PDROP, "reroute_schedule 'fastv' is not what.*'pdrop'.*'none'"),
        ({"tier": 100}, PDROP, "reroute_tier 100 is unknown. Choose one of: 192, 128, 64"),
        ({"tier": "many"}, PDROP, "tier 'many' must be a whole number"),
        ({"budget": 1}, PDROP, "budget 1 cannot be met"),
        ({"keep": [0.4, 0.3]}, PDROP, "has 2 ratios, but this server decides at 4 layers"),
        ({"keep": [0.4, 0.3, 0.2, 0.0]}, PDROP, r"reroute_keep 0 is outside \(0, 1\]"),
        ({"keep": [0.4, 0.3, 0.2, 1.5]}, PDROP, r"reroute_keep 1.5 is outside \(0, 1\]"),
        ({"keep": {}}, PDROP, "must be a list"),
        ({"tier": 64, "budget": 100}, PDROP, "exclude each other"),
        ({"tier": 64, "schedule": "none"}, PDROP, "exclude each other"),
        ({"tier": 64}, OWN, "needs a server with a named schedule.*Give reroute_keep"),
        ({"budget": 64}, OWN, "needs a server with a named schedule"),
        ({"tier": 64}, NUWA, "the vision encoder decides first"),
        ({"schedule": "none"}, NUWA, "the vision encoder decides first"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, schedule, told):
    for extra_args in both_spellings(options):
        with pytest.raises(ValueError) as error:
            RequestOptions.of(extra_args).applied(schedule)
        assert re.search(told, str(error.value)), error.value


@pytest.mark.parametrize(
    "said,asked",
    # JSON's true and false arrive as numbers in `vllm_xargs`.
    [(True, True), (1, True), (False, False), (0, False), (None, False), ("scores", "scores")],
)
@pytest.mark.parametrize("schedule", [PDROP, NUWA])
def test_a_request_that_wants_to_be_told_changes_nothing(said, asked, schedule):
    for extra_args in both_spellings({"explain": said}):
        options = RequestOptions.of(extra_args)
        assert options.explain is asked and options.applied(schedule) is schedule


@pytest.mark.parametrize("asked", [*HISTORIES, None])
@pytest.mark.parametrize("own", HISTORIES)
def test_the_history_is_the_request_s_where_it_says_one(own, asked):
    schedule = replace(PDROP, history=own, marker=(8, 9))
    for extra_args in both_spellings({"history": asked, "tier": 64}):
        applied = RequestOptions.of(extra_args).applied(schedule)
        assert applied.history == (asked or own) and applied.keep != PDROP.keep


def test_an_option_said_twice_is_refused():
    with pytest.raises(ValueError, match="say it twice"):
        RequestOptions.of({"reroute": {"tier": 64}, "reroute_tier": 128})
    with pytest.raises(ValueError, match="must be a dictionary"):
        RequestOptions.of({"reroute": 64})
