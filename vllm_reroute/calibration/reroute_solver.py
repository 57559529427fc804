"""The schedule that loses least where deferred tokens may come back: exact dynamic programming.

What a stage loses then depends on its own decision alone, so the best way through the layers from a
decision on is known once the best ways from all later decisions are.
"""

from __future__ import annotations

import numpy as np

from vllm_reroute.calibration.grid import Found, Problem


class Tails:
    """The least that can be lost from a decision on, for every budget.

    losses: mean over samples, [decision, layer, count]. monotone: no stage keeps more than the one
    before it. `at(n, layer)` is [bounds, tokens + 1]: with at most n decisions, the first of them at
    `layer`, and so many tokens for all layers from there on. A monotone problem has a bound per
    count, the most that may be kept; otherwise there is just one.
    """

    def __init__(self, losses: np.ndarray, problem: Problem, *, monotone: bool) -> None:
        self.problem, self.monotone = problem, monotone
        # [decision, end, count]: lost by the layers from a decision up to its stage's end.
        summed = np.cumsum(losses, axis=1, dtype=np.float64)
        self.stage = np.concatenate([np.zeros_like(summed[:, :1]), summed], axis=1)
        self.room = max(0, problem.left_after(problem.first_layer))
        self._at: dict[tuple[int, int], np.ndarray] = {}
        for decisions in range(1, problem.most_decisions + 1):
            for layer in range(problem.num_layers - 1, problem.first_layer - 1, -1):
                self._at[decisions, layer] = self._solve(decisions, layer)

    def at(self, decisions: int, layer: int) -> np.ndarray:
        return self._at[decisions, layer]

    def bound(self, count_index: int) -> int:
        """Row of `at` for stages behind one that keeps that count."""
        return count_index if self.monotone else 0

    def best(self) -> Found | None:
        """The best schedule; None if no schedule is within the tokens."""
        problem, most = self.problem, self.problem.most_decisions
        options = [
            (float(self.at(most, layer)[-1, problem.left_after(layer)]), layer)
            for layer in range(problem.first_layer, problem.num_layers)
            if problem.left_after(layer) >= 0
        ]
        loss, layer = min(options, default=(np.inf, 0))
        if not np.isfinite(loss):
            return None
        layers, counts = self._way(most, layer, len(problem.counts) - 1, problem.left_after(layer))
        return Found(loss=loss, layers=layers, counts=counts)

    def _solve(self, decisions: int, layer: int) -> np.ndarray:
        problem = self.problem
        best = np.full(self.room + 1, np.inf, np.float32)
        rows = []
        for index in range(len(problem.counts)):
            for end, spent in self._ends(decisions, layer, index, self.room):
                after = self._after(decisions, end, index, self.room - spent)
                np.minimum(best[spent:], self.stage[layer, end, index] + after, out=best[spent:])
            if self.monotone:
                rows.append(best.copy())
        return np.stack(rows) if self.monotone else best[None]

    def _ends(self, decisions: int, layer: int, index: int, room: int):
        """(end of the stage, tokens it runs), as far as there is room."""
        last = self.problem.num_layers
        for end in range(layer + 1, last + 1) if decisions > 1 else (last,):
            spent = (end - layer) * self.problem.counts[index]
            if spent <= room:
                yield end, spent

    def _after(self, decisions: int, end: int, index: int, room: int) -> np.ndarray | float:
        """Least loss from `end` on, by tokens left up to `room`."""
        if end == self.problem.num_layers:
            return 0.0
        return self.at(decisions - 1, end)[self.bound(index), : room + 1]

    def _way(
        self, decisions: int, layer: int, highest: int, room: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        options = []
        for index in range(highest + 1):
            for end, spent in self._ends(decisions, layer, index, room):
                after = self._after(decisions, end, index, room - spent)
                rest = after if isinstance(after, float) else float(after[-1])
                options.append((self.stage[layer, end, index] + rest, -end, index))
        _, negative_end, index = min(options)
        end, count = -negative_end, self.problem.counts[index]
        if end == self.problem.num_layers:
            return (layer,), (count,)
        highest = index if self.monotone else len(self.problem.counts) - 1
        spent = (end - layer) * count
        layers, counts = self._way(decisions - 1, end, highest, room - spent)
        return (layer, *layers), (count, *counts)
