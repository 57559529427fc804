"""Scores, intervals and paired differences of the quality harness."""

import pytest

from benchmarks.quality.outcomes import Outcome
from benchmarks.quality.scoring import Difference, Score, is_right, normalised, wilson


def outcome(index: int, answer: str | None, expected: str = "a1") -> Outcome:
    return Outcome(
        index=index,
        digest="",
        kind="where",
        expected=expected,
        answer=answer,
        error="gone" if answer is None else None,
    )


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
@pytest.mark.parametrize(
    ("correct", "total", "interval"),
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0000, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (20, 20, (0.8389, 1.0000)),
    ],
)
def test_wilson_interval(correct, total, interval):
    assert wilson(correct, total) == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize(
    ("said", "expected", "right"),
    [
        (" A1.", "a1", True),
        ("a1 \n", "a1", True),
        ("red Star", "red star", True),
        ("a1..", "a1", False),
        ("a1 a1", "a1", False),
        ("the a1", "a1", False),
        ("", "a1", False),
    ],
)
def test_only_space_case_and_a_final_stop_are_forgiven(said, expected, right):
    assert is_right(outcome(0, said, expected)) is right


def test_normalising_twice_changes_nothing():
    assert normalised(normalised(" Red star. ")) == "red star"


def test_failed_requests_are_in_no_score():
    answers = ["a1", "b2", None, "a1", None]
    score = Score.of(outcome(i, answer) for i, answer in enumerate(answers))
    assert score == Score(correct=2, answered=3, failed=2)
    assert score.accuracy == pytest.approx(2 / 3)
    with pytest.raises(AssertionError):
        is_right(outcome(0, None))


def test_no_answers_give_no_accuracy():
    score = Score.of([outcome(0, None)])
    assert score.accuracy is None and score.interval is None


def test_differences_are_over_questions_both_answered():
    first = {i: outcome(i, answer) for i, answer in enumerate(["a1", "a1", "no", None, "a1"])}
    second = {i: outcome(i, answer) for i, answer in enumerate(["a1", "no", "a1", "a1", None])}
    second[9] = outcome(9, "a1")
    assert Difference.between(first, second) == Difference(pairs=3, only_first=1, only_second=1)


def test_mcnemar_is_exact():
    # 2 * (1 + 12 + 66) / 2**12
    assert Difference(pairs=500, only_first=10, only_second=2).p_value == pytest.approx(158 / 4096)
    assert Difference(pairs=500, only_first=3, only_second=3).p_value == 1
    assert Difference(pairs=9, only_first=0, only_second=0).p_value == 1


def test_bootstrap_interval_agrees_with_the_normal_one():
    difference = Difference(pairs=1000, only_first=120, only_second=60)
    # Variance of a mean of 1, -1 and 0 with these shares.
    deviation = ((0.18 - 0.06**2) / 1000) ** 0.5
    expected = (0.06 - 1.96 * deviation, 0.06 + 1.96 * deviation)
    assert difference.value == pytest.approx(0.06)
    assert difference.interval == pytest.approx(expected, abs=0.0016)
    assert difference.interval == difference.interval


def test_equal_answers_leave_no_room():
    assert Difference(pairs=50, only_first=0, only_second=0).interval == (0, 0)
