"""A conversation run turn by turn: what each stage holds of it, and what a later turn brings back.

Every turn's own pictures are ranked by its question, among themselves, as `keep` defines it. With `Recall`, the
question also ranks the pictures of earlier turns, and those of the best that a stage does not hold are run through it.
"""

import copy
import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.quality.recall.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Recall:
    """cap: what a stage may hold of earlier pictures, as a multiple of what `keep` holds of them.

    share: of as many tokens as the stage keeps of all earlier pictures, how many a question chooses. absent: it chooses
    among those the stage does not hold, so that their number follows from the prompt's layout alone; else among all.
    Newcomers look at all that a stage holds and at each other in order; apart: at the text in front of the pictures and
    each other. Decisions choose of all tokens, those that have not run this turn as they were parked; arrived: later
    ones of what they hold and the newcomers.
    """

    cap: float = math.inf
    share: float = 1.0
    absent: bool = False
    text_turns: bool = False
    apart: bool = False
    arrived: bool = False


@dataclass(frozen=True)
class Schedule:
    """Decision layers, the share of a turn's visual tokens each keeps, and the decoder's depth."""

    layers: tuple[int, ...]
    keep: tuple[float, ...]
    depth: int

    @property
    def edges(self) -> tuple[int, ...]:
        return (0, *self.layers, self.depth)

    def kept(self, stage: int, visual: int) -> int:
        """stage: from 1. Returns how many of so many visual tokens run in it."""
        return max(1, int(visual * self.keep[stage - 1])) if visual else 0


@dataclass(kw_only=True)
class Cost:
    """rows: summed over layers. ranked: keys projected for ranking alone, summed over decisions."""

    rows: int = 0
    ranked: int = 0

    def clear(self) -> None:
        self.rows = self.ranked = 0


@dataclass(kw_only=True)
class Turn:
    """What a turn adds. token rows [rows, width], visual bool [rows]; end: rows of the question, one past its last."""

    rows: Tensor
    visual: Tensor
    end: int


class History:
    """What a conversation holds between turns."""

    def __init__(self, decoder: Decoder, schedule: Schedule) -> None:
        self.decoder, self.schedule = decoder, schedule
        self.kv = decoder.empty()
        stages = len(schedule.layers) + 1
        self.position = 0
        # Positions of the entries of each stage, in order, and which of them are visual.
        self.entries = [torch.empty(0, dtype=torch.long) for _ in range(stages)]
        self.entry_visual = [torch.empty(0, dtype=torch.bool) for _ in range(stages)]
        # Of all visual tokens so far: position, state at the first decision, and what each turn's pictures count.
        self.visual = torch.empty(0, dtype=torch.long)
        self.parked = torch.empty(0, decoder.final_norm.shape[0])
        self.sizes: list[int] = []
        self.cost = Cost()

    def copy(self) -> "History":
        """Goes on by itself from here."""
        other = copy.copy(self)
        other.kv = [copy.copy(layer) for layer in self.kv]
        other.entries, other.entry_visual = list(self.entries), list(self.entry_visual)
        other.sizes, other.cost = list(self.sizes), replace(self.cost)
        return other

    @property
    def held(self) -> int:
        """Entries summed over layers."""
        return sum(layer.keys.shape[1] for layer in self.kv)

    def run(self, turn: Turn, recall: Recall | None = None) -> Tensor:
        """Runs the turn; returns logits of its rows from the question's last on, [rows - end + 1, vocabulary]."""
        decoder, edges = self.decoder, self.schedule.edges
        count = len(turn.rows)
        self._turn, self._positions = turn, self.position + torch.arange(count)
        self._state = turn.rows.clone()
        own = turn.visual.nonzero().flatten()
        text = (~turn.visual).nonzero().flatten()
        # Earlier pictures: latest state, and whether it ran this turn.
        earlier, came = self.parked.clone(), torch.zeros(len(self.visual), dtype=torch.bool)
        if recall is not None and (not len(self.visual) or (recall.text_turns and len(own))):
            recall = None
        rows, back = torch.arange(count), torch.empty(0, dtype=torch.long)
        parked = turn.rows[own]
        for stage, (first, beyond) in enumerate(itertools.pairwise(edges)):
            if stage:
                scores, of_own = self._scores(stage, first, text, own, earlier, recall is not None)
                kept = own[_best(of_own, self.schedule.kept(stage, len(own)))]
                rows = torch.cat([text, kept]).sort().values
                if recall is not None:
                    back = self._newcomers(stage, scores, came, recall)
                    came[back] = True
            if stage == 1:
                parked = self._state[own]
            positions = torch.cat([self.visual[back], self._positions[rows]])
            hidden = torch.cat([earlier[back], self._state[rows]])
            is_visual = torch.cat([torch.ones(len(back), dtype=torch.bool), turn.visual[rows]])
            sees = self._sees(stage, positions, len(back), recall)
            at = decoder.rotation(positions)
            for layer in range(first, beyond):
                hidden = decoder.run(layer, hidden, at, self.kv[layer], sees)
            self.entries[stage] = torch.cat([self.entries[stage], positions])
            self.entry_visual[stage] = torch.cat([self.entry_visual[stage], is_visual])
            self.cost.rows += len(positions) * (beyond - first)
            earlier[back], self._state[rows] = hidden[: len(back)], hidden[len(back) :]
        self.position += count
        if len(own):
            self.visual = torch.cat([self.visual, self._positions[own]])
            self.parked = torch.cat([self.parked, parked])
            self.sizes.append(len(own))
        return decoder.logits(self._state[turn.end - 1 :])

    def _scores(
        self, stage: int, layer: int, text: Tensor, own: Tensor, earlier: Tensor, recalls: bool
    ) -> tuple[Tensor, Tensor]:
        """The question's last row's attention to earlier and to own visual tokens at a decision.

        Either softmax runs over text before it and what the stage holds: one with own candidates, and one, if it
        recalls, with the earlier tokens that the stage does not hold.
        """
        decoder, end = self.decoder, self._turn.end
        asks = torch.cat([text[text < end], own])
        at = decoder.rotation(self._positions[asks])
        query, key, _ = decoder.project(layer, self._state[asks], at)
        present = torch.cat([self.kv[layer].keys, key], dim=1)
        num_present, num_shared = present.shape[1], present.shape[1] - len(own)
        if recalls:
            absent = (self.slots(stage) < 0).nonzero().flatten()
            at = decoder.rotation(self.visual[absent])
            present = torch.cat([present, decoder.project(layer, earlier[absent], at)[1]], dim=1)
        last = query[:, len(asks) - len(own) - 1, :, None]
        logits = (present @ last)[..., 0] * decoder.head_size**-0.5
        self.cost.ranked += present.shape[1] - num_shared
        of_own = logits[:, :num_present].softmax(dim=-1).mean(dim=0)[num_shared:]
        if not recalls:
            return torch.empty(0), of_own
        shared = torch.cat([logits[:, :num_shared], logits[:, num_present:]], dim=1)
        row = shared.softmax(dim=-1).mean(dim=0)
        of_earlier = row[self.slots(stage)]
        of_earlier[absent] = row[num_shared:]
        return of_earlier, of_own

    def slots(self, stage: int) -> Tensor:
        """Of each visual token of earlier turns, its entry in a stage's layers, -1 where it has none."""
        found = torch.full((len(self.visual),), -1)
        at = self.entry_visual[stage].nonzero().flatten()
        found[torch.searchsorted(self.visual, self.entries[stage][at])] = at
        return found

    def _newcomers(self, stage: int, scores: Tensor, came: Tensor, recall: Recall) -> Tensor:
        """Indices of earlier visual tokens that are chosen and not held, ascending."""
        has = self.slots(stage) >= 0
        if recall.arrived and stage > 1:
            scores = scores.masked_fill(~(has | came), -1.0)
        share = self.schedule.kept(stage, len(self.visual))
        if recall.absent:
            scores = scores.masked_fill(has, -1.0)
        chosen = _best(scores, max(1, int(share * recall.share)))
        new = chosen[~has[chosen] & (scores[chosen] >= 0)]
        kept = sum(self.schedule.kept(stage, size) for size in self.sizes)
        room = max(0.0, recall.cap * kept - int(has.sum()))
        return new[_best(scores[new], int(min(room, len(new))))]

    def _sees(self, stage: int, positions: Tensor, back: int, recall: Recall | None) -> Tensor:
        """bool [rows, entries]: by order; newcomers, the first rows, as `recall` says."""
        before = len(self.entries[stage])
        entries = before + len(positions)
        sees = torch.ones(len(positions), entries, dtype=torch.bool).tril(before)
        if back and recall is not None and recall.apart:
            sees[:back, :before] = self.entries[stage] < self.visual[0]
        return sees


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest, ascending; of equal ones the first wins."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values
