"""How much of what one server has over another a third one has, too: a share, with its interval."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.quality.outcomes import Outcome
from benchmarks.quality.scoring import RESAMPLES, SEED, is_right

# Right or wrong of the lowest, the one between, the highest.
Rights = tuple[bool, bool, bool]


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Three servers' answers to the same questions, counted by who was right."""

    counts: Mapping[Rights, int]

    @classmethod
    def between(
        cls,
        low: Mapping[int, Outcome],
        middle: Mapping[int, Outcome],
        high: Mapping[int, Outcome],
    ) -> "Gap":
        """Over the questions that all three answered."""
        counts: Counter[Rights] = Counter()
        for index in low.keys() & middle.keys() & high.keys():
            below, between, above = low[index], middle[index], high[index]
            if not (below.failed or between.failed or above.failed):
                counts[is_right(below), is_right(between), is_right(above)] += 1
        return cls(counts=counts)

    @property
    def questions(self) -> int:
        return sum(self.counts.values())

    @property
    def share(self) -> float | None:
        """(middle - low) / (high - low); None where `high` is not surely above `low`."""
        found = self._found()
        return None if found is None else found[0]

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the share: 95 % percentile bootstrap over questions, all three resampled together."""
        found = self._found()
        return None if found is None else found[1]

    def _found(self) -> tuple[float, tuple[float, float]] | None:
        if not self.counts:
            return None
        rights, numbers = zip(*sorted(self.counts.items()), strict=True)
        low, middle, high = np.array(rights, dtype=np.int64).T
        counts = np.array(numbers)
        draws = np.random.default_rng(SEED).multinomial(
            self.questions, counts / self.questions, RESAMPLES
        )
        gaps = draws @ (high - low)
        if np.percentile(gaps, 2.5) <= 0:
            return None
        shares = (draws @ (middle - low))[gaps > 0] / gaps[gaps > 0]
        below, above = np.percentile(shares, [2.5, 97.5])
        share = float(counts @ (middle - low) / (counts @ (high - low)))
        return share, (float(below), float(above))
