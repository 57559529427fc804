"""Right or wrong, shares with their intervals, and paired differences."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from benchmarks.quality.outcomes import Outcome

RESAMPLES = 20_000
SEED = 0


def normalised(text: str) -> str:
    """Without surrounding space, a full stop at the end, and case."""
    return text.strip().removesuffix(".").rstrip().casefold()


def is_right(outcome: Outcome) -> bool:
    """Exact match. Only answers can be judged; whoever calls this leaves failed requests out."""
    assert outcome.answer is not None, "a failed request has no answer to judge"
    return normalised(outcome.answer) == normalised(outcome.expected)


@dataclass(frozen=True, kw_only=True)
class Score:
    """correct of answered questions; failed ones are in neither."""

    correct: int
    answered: int
    failed: int

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> "Score":
        outcomes = list(outcomes)
        answered = [outcome for outcome in outcomes if not outcome.failed]
        return cls(
            correct=sum(map(is_right, answered)),
            answered=len(answered),
            failed=len(outcomes) - len(answered),
        )

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.answered if self.answered else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval of the accuracy."""
        return wilson(self.correct, self.answered) if self.answered else None


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927), without continuity correction."""
    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Accuracy of one configuration minus another's, over the questions that both answered.

    only_first, only_second: questions that just one of them got right.
    """

    pairs: int
    only_first: int
    only_second: int

    @classmethod
    def between(cls, first: Mapping[int, Outcome], second: Mapping[int, Outcome]) -> "Difference":
        both = [
            (is_right(first[index]), is_right(second[index]))
            for index in first.keys() & second.keys()
            if not first[index].failed and not second[index].failed
        ]
        return cls(
            pairs=len(both),
            only_first=sum(a and not b for a, b in both),
            only_second=sum(b and not a for a, b in both),
        )

    @property
    def value(self) -> float:
        return (self.only_first - self.only_second) / self.pairs

    @property
    def interval(self) -> tuple[float, float]:
        """95 % percentile bootstrap interval over questions.

        A resample of questions is, for this purpose, a draw of how many of each outcome it holds.
        """
        same = self.pairs - self.only_first - self.only_second
        shares = np.array([self.only_first, self.only_second, same]) / self.pairs
        draws = np.random.default_rng(SEED).multinomial(self.pairs, shares, RESAMPLES)
        low, high = np.percentile((draws[:, 0] - draws[:, 1]) / self.pairs, [2.5, 97.5])
        return float(low), float(high)

    @property
    def p_value(self) -> float:
        """Exact McNemar test: how likely so uneven a split is if either is as often right alone."""
        alone = self.only_first + self.only_second
        return float(binomtest(self.only_first, alone).pvalue) if alone else 1.0
