"""The table of questions with one look and with two: who is counted where, and what is subtracted from what."""

import pytest

from benchmarks.grounding.questions import EVERY_KIND, TWO_LOOKS
from benchmarks.quality.looks import PAIRS, looks, markdown
from benchmarks.quality.methods import COMPARISONS
from benchmarks.quality.outcomes import Outcome


def outcomes(right: dict[str, int]) -> dict[int, Outcome]:
    """Twenty questions of every kind, the first ones of each answered rightly."""
    asked = [(kind, number) for kind in right for number in range(20)]
    return {
        i: Outcome(
            index=i,
            digest="d",
            kind=kind,
            expected="yes",
            answer="yes" if number < right[kind] else "no",
        )
        for i, (kind, number) in enumerate(asked)
    }


def test_pairs_and_kinds_are_there():
    assert set(PAIRS) <= set(COMPARISONS) and set(TWO_LOOKS) < set(EVERY_KIND)


def test_looks_are_counted_apart():
    reroute, remove = PAIRS[0]
    asked = {
        (reroute, 0.22): outcomes({"where": 20, "at": 10, "beside": 15}),
        (remove, 0.22): outcomes({"where": 20, "at": 12, "beside": 3}),
    }
    one, two = looks(asked, [0.33, 0.22])
    assert [one["looks"], one["pairs"], two["looks"], two["pairs"]] == [1, 40, 2, 20]
    assert [each["accuracy"] for each in one["accuracies"]] == [0.75, 0.8]
    assert one["difference"] == pytest.approx(-0.05) and two["difference"] == pytest.approx(0.6)
    lines = list(markdown([one, two]))
    assert [line.split("|")[1].strip() for line in lines[-2:]] == ["1", "2"]
    assert "+60.0" in lines[-1]


def test_nothing_is_said_without_both_methods():
    assert looks({(PAIRS[0][0], 0.22): outcomes({"where": 1})}, [0.22]) == []
    assert list(markdown([])) == []
