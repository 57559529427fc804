"""The lasting facts of a batch's requests as arrays, so that a step is planned without a loop over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.turns import Turn


def rows_alike(table: np.ndarray) -> tuple[int, ...]:
    """Per row of a table, the first of those in a row that are equal to it."""
    first = [0]
    same = (table[1:] == table[:-1]).all(axis=1)
    for row, is_same in enumerate(same.tolist(), 1):
        first.append(first[-1] if is_same else row)
    return tuple(first)


@dataclass(frozen=True)
class BatchTurns:
    """All turns of a batch as arrays.

    turns: [turns], with their request. request, begin, end: [turns] int64. deferred: [stages, turns] int64.
    """

    turns: tuple[tuple[int, Turn], ...]
    request: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    deferred: np.ndarray

    @classmethod
    def of(cls, routings: Sequence[RequestRouting | None], num_stages: int) -> BatchTurns:
        turns = tuple(
            (i, turn)
            for i, routing in enumerate(routings)
            if routing is not None
            for turn in routing.turns.turns
        )
        facts = [(i, t.begin, t.end, *map(t.deferred, range(num_stages))) for i, t in turns]
        table = np.array(facts, dtype=np.int64).reshape(len(facts), 3 + num_stages).T
        return cls(turns, table[0], table[1], table[2], table[3:])

    def ending(self, num_computed: np.ndarray, end: np.ndarray) -> list[tuple[int, Turn]]:
        """Those whose end lies in a step from num_computed to end, both [requests], with their request:
        one of a request."""
        ends = (num_computed[self.request] < self.end) & (self.end <= end[self.request])
        ending = [self.turns[number] for number in ends.nonzero()[0].tolist()]
        assert len(dict(ending)) == len(ending), "two turns end in one step"
        return ending


@dataclass(frozen=True)
class BatchRouting:
    """The lasting facts of a batch's requests as arrays; text requests have a prompt of 0 tokens.

    num_prompt, text_prefix: [requests] int64. settled: [requests] int64, end of the last turn: from
    there on all that is not deferred runs everywhere. deferred: [stages, requests] int64, by then.
    """

    routings: tuple[RequestRouting | None, ...]
    num_prompt: np.ndarray
    text_prefix: np.ndarray
    settled: np.ndarray
    deferred: np.ndarray
    turns: BatchTurns

    @classmethod
    def of(cls, routings: Sequence[RequestRouting | None], num_stages: int) -> BatchRouting:
        nothing = (0,) * (3 + num_stages)
        facts = [
            (r.num_prompt, r.text_prefix, r.settled, *r.deferred) if r is not None else nothing
            for r in routings
        ]
        table = np.array(facts, dtype=np.int64).reshape(len(facts), 3 + num_stages).T.copy()
        turns = BatchTurns.of(routings, num_stages)
        return cls(tuple(routings), table[0], table[1], table[2], table[3:], turns)

    @cached_property
    def like_stage(self) -> tuple[int, ...]:
        """Per stage, the first of those next to it that hold as much of every settled request."""
        return rows_alike(self.deferred)

    def later_stages(self, num_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What stages after the first decision have run once `num_tokens` [requests] tokens have run.

        Positions [requests] they have come to, and the visual tokens [stages, requests] before them
        that were deferred.
        """
        if (num_tokens >= self.settled).all():
            return num_tokens, self.deferred
        turns = self.turns
        run = num_tokens[turns.request]
        inside, over = (turns.begin < run) & (run < turns.end), turns.end <= run
        reached, deferred = num_tokens.copy(), np.zeros_like(self.deferred)
        if inside.any():
            reached[turns.request[inside]] = turns.begin[inside]
        if over.any():
            np.add.at(deferred.T, turns.request[over], turns.deferred[:, over].T)
        return reached, deferred
