"""Reroute on conversations whose later questions bring back visual tokens of earlier turns.

All turns of a prompt at once, layer by layer, and no cache: what a turn leaves behind for later ones is what a
causal mask lets these see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from .decoder import LayerKV
from .families.prompt import Prompt
from .routed import RoutedOracle
from .selection import highest, last_prompt_row, num_kept

SHARE = 0.25
CAP = 2
FEWEST = 2
"""Tokens of its own that a turn needs behind what it brings back."""


@dataclass(frozen=True)
class Instance:
    """A token as it runs in one turn. begin: where the turn that brought it back has it run; None for its own."""

    row: int
    begin: int | None = None

    @property
    def order(self) -> tuple[int, bool, int]:
        """Sorts by entry of the K/V: what is brought back comes in front of the turn's last tokens."""
        if self.begin is None:
            return (self.row, True, self.row)
        return (self.begin, False, self.row)


@dataclass(frozen=True)
class Question:
    """A turn that decides. own: visual rows that come with it; none where it looks back instead, and what it
    brings back stands in front of its row `begin`. counts: visual tokens that run, per decision."""

    end: int
    own: tuple[int, ...]
    begin: int
    counts: tuple[int, ...]


class RecallOracle(RoutedOracle):
    """As its base, but turns that bring no visual tokens rank those of earlier turns that a stage does not hold.

    marker: tokens that every turn ends with. `selected` are the visual tokens that the stage holds in the end;
    `scores` have one entry per visual token, what it was last ranked by; NaN where it never was.
    """

    def __init__(
        self,
        model_dir: str | PathLike[str],
        *,
        marker: int,
        layers: Sequence[int],
        keep: Sequence[float],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model_dir, action="reroute", layers=layers, keep=keep, dtype=dtype)
        self.marker = marker

    def _prefill(
        self, prompt: Prompt, kv: list[LayerKV], turn_ends: Sequence[int]
    ) -> tuple[Tensor, list[list[int]], list[Tensor]]:
        """A visual token is there once for its own turn, and once for every turn that may bring it back.

        The latter begin as they were parked: as the former, at the input of the first decision layer.
        """
        rows = range(len(prompt.visual))
        visual = prompt.visual.nonzero().flatten().tolist()
        text = [Instance(row) for row in rows if not prompt.visual[row]]
        questions = self._questions(visual, turn_ends)
        states = dict(zip(map(Instance, rows), prompt.embeddings, strict=True))
        running = [Instance(row) for row in rows]
        selected: list[list[int]] = []
        scores: list[Tensor] = []
        for layer in range(self.depth):
            if layer in self.keep_at:
                if not selected:
                    for question in questions:
                        states |= {
                            Instance(row, question.begin): states[Instance(row)]
                            for row in visual
                            if row < question.end and not question.own
                        }
                number, last = len(selected), torch.full((len(rows),), torch.nan)
                held: list[Instance] = []
                for question in questions:
                    candidates = _candidates(question, visual, held)
                    if question.counts[number] == 0:
                        continue
                    asks = Instance(question.end - 1)
                    before = [token for token in text if token.row < question.end]
                    ranks = self._rank(
                        layer, prompt, states, asks, [*before, *held, *candidates], candidates
                    )
                    last[[token.row for token in candidates]] = ranks
                    held += highest_of(ranks, candidates, question.counts[number])
                selected.append(sorted(visual.index(token.row) for token in held))
                scores.append(last[visual])
                running = sorted([*text, *held], key=lambda token: token.order)
            hidden = torch.stack([states[token] for token in running])
            at = prompt.positions[..., [token.row for token in running]]
            hidden = self._decoder.run_layer(layer, hidden, at, kv[layer])
            states |= dict(zip(running, hidden, strict=True))
            if layer < len(prompt.deepstack):
                for row in rows:
                    states[Instance(row)] = states[Instance(row)] + prompt.deepstack[layer][row]
        return states[Instance(rows[-1])], selected, scores

    def _questions(self, visual: Sequence[int], ends: Sequence[int]) -> list[Question]:
        """The turns that decide, and how many visual tokens each lets run: known from where things are."""
        questions: list[Question] = []
        pictures: list[int] = []
        held = [0] * len(self.keep_at)
        before = 0
        for end in ends:
            own = tuple(row for row in visual if before <= row < end)
            before, begin = end, end - max(self.marker, FEWEST)
            if own:
                pictures.append(len(own))
                counts = [num_kept(len(own), ratio, len(own)) for ratio in self.keep_at.values()]
            elif questions:
                begin = max(begin, questions[-1].end)
                if end - begin < FEWEST:
                    continue
                counts = [
                    self._room(pictures, *of)
                    for of in zip(self.keep_at.values(), held, strict=True)
                ]
            else:
                continue
            if any(counts):
                questions.append(Question(end, own, begin, tuple(counts)))
                held = [has + more for has, more in zip(held, counts, strict=True)]
        assert sum(pictures) == len(visual), "a picture belongs to no turn"
        return questions

    def _room(self, pictures: Sequence[int], ratio: float, held: int) -> int:
        """Visual tokens that one question adds to the `held` ones of a stage, after pictures of these sizes."""
        together = sum(pictures)
        quarter = max(1, int(SHARE * num_kept(together, ratio, together)))
        most = CAP * sum(num_kept(size, ratio, size) for size in pictures)
        return max(0, min(quarter, most - held, together - held))

    def _rank(
        self,
        layer: int,
        prompt: Prompt,
        states: dict[Instance, Tensor],
        asks: Instance,
        present: list[Instance],
        candidates: list[Instance],
    ) -> Tensor:
        """Attention of the token that asks to each candidate [candidates], fp32, among all that is present."""
        hidden = torch.stack([states[token] for token in present])
        at = prompt.positions[..., [token.row for token in present]]
        query, key, _ = self._decoder.project(layer, hidden, at)
        row = last_prompt_row(query[:, present.index(asks)], self._decoder.repeat_heads(layer, key))
        return row[[present.index(token) for token in candidates]]


def _candidates(
    question: Question, visual: Sequence[int], held: Sequence[Instance]
) -> list[Instance]:
    """Whom a question ranks for a stage that holds these visual tokens, in order."""
    if question.own:
        return [Instance(row) for row in question.own]
    has = {token.row for token in held}
    earlier = (row for row in visual if row < question.end)
    return [Instance(row, question.begin) for row in earlier if row not in has]


def highest_of(scores: Tensor, candidates: list[Instance], count: int) -> list[Instance]:
    """The `count` best, see `highest`."""
    of_row = {token.row: token for token in candidates}
    return [of_row[row] for row in highest(scores, list(of_row), count)]
