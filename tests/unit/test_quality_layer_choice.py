"""The table of layer choice and bypass: what is subtracted from what, and where it says nothing."""

import pytest

from benchmarks.quality.layer_choice import EFFECTS, SQUARES, markdown, squares
from benchmarks.quality.methods import METHODS
from benchmarks.quality.outcomes import Outcome


def outcomes(right, asked=40):
    """The first `right` of all questions answered rightly."""
    return {
        i: Outcome(
            index=i, digest="d", kind="k", expected="yes", answer="yes" if i < right else "no"
        )
        for i in range(asked)
    }


FOUR = dict(zip(SQUARES["as FastV"], (10, 20, 30, 36), strict=True))


@pytest.fixture
def asked():
    return {(method, 0.22): outcomes(right) for method, right in FOUR.items()}


def test_methods_of_a_square_are_methods():
    assert all(method in METHODS for methods in SQUARES.values() for method in methods)
    for published, calibrated, *_ in SQUARES.values():
        assert "remove" in published and calibrated.startswith("calibrated remove")


def test_effects_are_differences_of_the_same_questions(asked):
    (square,) = squares(asked, [0.33, 0.22])
    assert (square["title"], square["budget"]) == ("as FastV", 0.22)
    points = {effect["name"]: round(40 * effect["difference"]) for effect in square["effects"]}
    assert points == {
        "layer choice, removing": 10,
        "layer choice, rerouting": 6,
        "bypass, published layers": 20,
        "bypass, calibrated layers": 16,
        "both": 26,
    }


def test_a_square_with_a_corner_missing_is_left_out(asked):
    del asked["fastv reroute", 0.22]
    assert squares(asked, [0.22]) == [] and list(markdown([])) == []


def test_the_table_marks_what_is_beyond_chance(asked):
    asked["calibrated reroute", 0.22] = outcomes(31)
    lines = list(markdown(squares(asked, [0.22])))
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells[:2] == ["as FastV", "22 %"] and len(cells) == 2 + len(EFFECTS)
    assert cells[2].startswith("**+25.0** (")
    # One question of forty.
    assert cells[3].startswith("+2.5 (")
