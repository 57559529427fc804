"""Things of other distributions: found by entry points, refused with the distribution's name."""

import sys
from pathlib import Path

import pytest
import torch

from vllm_reroute.registry import Registry
from vllm_reroute.routing.scorers import Scorer
from vllm_reroute.routing.scorers.scorer import check_scores
from vllm_reroute.schedule import PublishedSchedule, RerouteOptions
from vllm_reroute.schedule.published import SCHEDULES, SCORERS
from vllm_reroute.schedule.shapes import flat

from .test_no_device_sync import DEPTH, STEPS, Decoder, going

KINDS = {"schedule": SCHEDULES, "scorer": SCORERS}
WHO = "mine-{} 1.5"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a distribution on the path; returns a registry that has not looked yet."""
    for known in KINDS.values():
        list(known)  # The package's own look once, before anything is on the path.
    monkeypatch.syspath_prepend(tmp_path)

    def put(kind, entries, code="", who="mine"):
        known = KINDS[kind]
        module = f"{who}_{kind}"
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.delitem(sys.modules, module, raising=False)
        info = tmp_path / f"{module}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {who}-{kind}\nVersion: 1.5\n")
        lines = [f"{name} = {module}:{attribute}" for name, attribute in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{known.group}]", *lines]))
        return Registry(
            kind, known.group, known._built_in, reserved=known._reserved, problem=known._problem
        )

    return put


SCHEDULE = """
from vllm_reroute.schedule import PublishedSchedule
def shape(first, decisions):
    return {shape}
MADE = {{{action!r}: PublishedSchedule(layers={layers}, shape=shape, keep={keep})}}
"""
SCORER = """
from vllm_reroute.routing.scorers import Scorer
class Made({base}):
    def score(self, stream, positions{more}):
        pass
"""


def schedule(shape="[first] * decisions", layers=(2, 9), action="reroute", keep=None):
    return SCHEDULE.format(shape=shape, layers=layers, action=action, keep=keep or {})


def scorer(base="Scorer", more=", prompts"):
    return SCORER.format(base=base, more=more)


@pytest.mark.parametrize(
    "kind,code,attribute",
    [("schedule", schedule(), "MADE"), ("scorer", scorer(), "Made")],
    ids=["schedule", "scorer"],
)
def test_what_is_installed_is_there_beside_what_is_built_in(install, kind, code, attribute):
    registry = install(kind, {"mine": attribute}, code)
    assert list(registry) == [*KINDS[kind], "mine"]
    assert "mine" in registry and "other" not in registry and registry.problems() == []
    assert registry.title("mine") == f"mine (from {WHO.format(kind)})"
    assert registry["mine"].__class__ is (dict if kind == "schedule" else type(Scorer))
    built_in = next(iter(KINDS[kind]))
    assert registry[built_in] is KINDS[kind][built_in] and registry.title(built_in) == built_in


@pytest.mark.parametrize(
    "kind,name,code,wrong",
    [
        ("schedule", "pdrop", schedule(), "has the same name as one of vllm-reroute itself"),
        ("scorer", "random", scorer(), "has the same name as one of vllm-reroute itself"),
        ("schedule", "none", schedule(), "a name that cannot be used"),
        ("schedule", "My Own", schedule(), "a name that cannot be used"),
        ("schedule", "mine", "import nosuch", "cannot be imported: ModuleNotFoundError"),
        ("scorer", "mine", "1 / 0", "cannot be imported: ZeroDivisionError"),
        ("schedule", "mine", "MADE = 3", "must be a mapping of reroute and/or remove"),
        ("schedule", "mine", "MADE = {'reroute': 3}", "no layers, keep, shape for reroute"),
        ("schedule", "mine", schedule(action="both"), "must be a mapping of reroute and/or remove"),
        ("schedule", "mine", schedule(layers=(9, 2)), "layers (9, 2): they must be whole"),
        ("schedule", "mine", schedule(layers=(9, 40)), "layers (9, 40): they must lie in 0 to 31"),
        ("schedule", "mine", schedule(layers=(0, 9)), "decides at layer 0, where only nuwa can"),
        ("schedule", "mine", schedule(keep={99: (0.1, 0.1)}), "a tier 99: allowed are 192"),
        ("schedule", "mine", schedule(keep={64: (0.1,)}), "ratios (0.1,) at tier 64"),
        ("schedule", "mine", schedule(keep={64: (0.1, 2)}), "ratios (0.1, 2) at tier 64"),
        ("schedule", "mine", schedule("[first]"), "it must be 2 ratios"),
        ("schedule", "mine", schedule("[1 - first] * 2"), "never fall"),
        ("schedule", "mine", schedule("first / 0"), "a shape that fails"),
        ("schedule", "mine", schedule("[min(first, .5)] * 2"), "a shape that stays below 1"),
        ("scorer", "mine", "Made = 3", "must be a class with a method score"),
        ("scorer", "mine", scorer("object"), "must have accumulates"),
        ("scorer", "mine", scorer(more=""), "called as Made.score(self, stream, positions, prompt"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_with_its_distribution(install, kind, name, code, wrong):
    registry = install(kind, {name: "MADE" if kind == "schedule" else "Made"}, code)
    assert list(registry), "names never raise"
    (problem,) = registry.problems()
    assert WHO.format(kind) in problem and wrong in problem and "ninstall" in problem
    with pytest.raises(ValueError, match=WHO.format(kind)):
        registry[name]


def test_two_distributions_with_one_name(install):
    install("schedule", {"mine": "MADE"}, schedule())
    registry = install("schedule", {"mine": "MADE"}, schedule(), who="yours")
    with pytest.raises(ValueError, match=r"(mine|yours)-schedule 1.5 .* (mine|yours)-schedule 1.5"):
        registry.check()


def test_options_take_it_and_say_what_it_cannot_do(install, monkeypatch):
    made = install("schedule", {"mine": "MADE"}, schedule())
    summing = scorer() + "    accumulates = True\n"
    ranks = install("scorer", {"sums": "Made"}, summing)
    for module in ("options", "request_options", "published"):
        monkeypatch.setattr(f"vllm_reroute.schedule.{module}.SCHEDULES", made)
    for module in ("options", "published"):
        monkeypatch.setattr(f"vllm_reroute.schedule.{module}.SCORERS", ranks)
    found = RerouteOptions(schedule="mine", tier=192, scorer="sums").resolve(16)
    assert (found.name, found.layers, found.scorer) == ("mine", (2, 4), "sums")
    assert abs(found.average() - 192) <= 0.5, "solved for, since the schedule says no tiers"
    for options, words in (
        ({"schedule": "mine", "action": "remove"}, r"--reroute-action remove .*mine \(from mine-sch"),
        ({"schedule": "pdrop", "action": "remove", "scorer": "sums"}, "Allowed: attention, random"),
        ({"schedule": "nosuch"}, "fastv, pdrop, nuwa, mine, none"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            RerouteOptions(**options)
    with pytest.raises(ValueError, match=r"--reroute-tier 64 cannot be met.*--reroute-budget"):
        RerouteOptions(schedule="mine", tier=64).resolve(16)


@pytest.mark.parametrize(
    "scores",
    [torch.zeros(2, 5), torch.zeros(3, 4), torch.zeros(3, 5, dtype=torch.bfloat16)],
    ids=["requests", "width", "type"],
)
def test_scores_of_another_form_are_refused(scores):
    class Mine(Scorer):
        pass

    class Prompts:
        lens, width = (5, 3, 4), 5

    check_scores(torch.zeros(3, 5), Prompts, Mine(None))
    with pytest.raises(ValueError, match=r"Mine returned .* It must be torch.float32 \[3, 5\]"):
        check_scores(scores, Prompts, Mine(None))


def test_the_decoder_looks_at_the_form_of_scores():
    class Short(Scorer):
        def score(self, stream, positions, prompts):
            return stream.new_zeros(len(prompts.lens), prompts.width - 1, dtype=torch.float32)

    schedule = RerouteOptions(layers=(2, 5), keep=(0.5, 0.25)).resolve(DEPTH)
    decoder = Decoder(schedule)
    decoder.routed._scorers = {layer: Short(None) for layer in schedule.layers}
    with pytest.raises(ValueError, match=r"Short returned"):
        decoder.step([going(schedule, *request) for request in STEPS["all of it"]])


@pytest.mark.parametrize("name", ["taper", "magnitude"])
def test_the_document_shows_the_example_package(name):
    """Whose files a server test installs; each is as short as it says."""
    root = Path(__file__).parents[2]
    code = (root / "examples" / "plugins" / "reroute_plugins" / f"{name}.py").read_text()
    assert f"```python\n{code}```" in (root / "docs" / "extending.md").read_text()
    line = next(
        line
        for line in (root / "examples" / "plugins" / "pyproject.toml").read_text().splitlines()
        if line.startswith(f"{name} =")
    )
    assert line in (root / "docs" / "extending.md").read_text()


def test_a_schedule_needs_no_tiers():
    assert PublishedSchedule(layers=(2,), shape=flat).keep == {}
