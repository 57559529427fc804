"""Holds test conversations by every way of dealing with earlier pictures, and counts what each costs.

The right answers stand in the history, and a turn is right where every token of its answer is the likeliest in turn:
that is greedy decoding behind that history.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.grounding.conversations import Conversation
from benchmarks.grounding.evaluate import load
from benchmarks.grounding.lessons import exchanges
from benchmarks.grounding.scenes import render
from benchmarks.grounding.vocabulary import IMAGE_TOKEN, VISUAL_TOKENS, prompt_start, token
from benchmarks.quality.methods import routed
from benchmarks.quality.model_shape import ModelShape
from benchmarks.quality.recall.decoder import Decoder
from benchmarks.quality.recall.history import History, Recall, Schedule, Turn
from vllm_reroute.schedule import RerouteOptions

METHOD = "pdrop reroute"
BUDGETS = (0.33, 0.22, 0.11, 0.05)
DENSE, RERANK, KEEP = "dense", "rerank", "keep"
RECALLS: dict[str, Recall | None] = {
    KEEP: None,
    "recall": Recall(),
    "recall, cap 2": Recall(cap=2),
    "recall, cap 1.5": Recall(cap=1.5),
    "recall half": Recall(share=0.5),
    "recall quarter": Recall(share=0.25),
    "half more, cap 2": Recall(share=0.5, absent=True, cap=2),
    "quarter more, cap 2": Recall(share=0.25, absent=True, cap=2),
    "quarter more, cap 2, text turns": Recall(share=0.25, absent=True, cap=2, text_turns=True),
    "recall, apart": Recall(apart=True),
    "recall, arrived": Recall(arrived=True),
}
# Logits of a turn's answer, and what is held behind it.
Told = tuple[Tensor, History]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One turn of one conversation by one method.

    turn: from 1. kind: how it follows what was said. rows: run up to the answer's first token, summed over layers.
    ranked: keys projected only to be ranked. held: entries at the end of the turn, summed over layers.
    """

    conversation: int
    turn: int
    kind: str
    budget: float | None
    method: str
    right: bool
    rows: int
    ranked: int
    held: int


class Talker:
    """Holds conversations with a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.model, self.processor = load(folder, torch.float32)
        self.decoder = Decoder(self.model)
        self.dense = Schedule((), (), len(self.decoder.layers))
        self.schedules = {budget: schedule_of(budget, ModelShape.of(folder)) for budget in BUDGETS}

    @torch.inference_mode()
    def outcomes(self, number: int, talk: Conversation) -> list[Outcome]:
        """Of every turn by every method. number: the conversation's."""
        turns, answers = self._ready(talk)
        found = []
        for budget, method, held in self._held(turns):
            for index, (logits, history) in enumerate(held):
                found.append(
                    Outcome(
                        conversation=number,
                        turn=index + 1,
                        kind=talk.turns[index].kind,
                        budget=budget,
                        method=method,
                        right=logits.argmax(-1).tolist() == [*answers[index], token("</s>")],
                        rows=history.cost.rows - len(answers[index]) * self.dense.depth,
                        ranked=history.cost.ranked,
                        held=history.held,
                    )
                )
        return found

    def _ready(self, talk: Conversation) -> tuple[list[Turn], list[list[int]]]:
        """The turns' rows, each with its right answer behind it, and the answers' tokens but for their end."""
        pictures = [render(scene) for scene in talk.scenes]
        pixels = self.processor.image_processor(images=pictures, return_tensors="pt")[
            "pixel_values"
        ]
        features = self.model.get_image_features(pixels).pooler_output
        embed = self.model.get_input_embeddings()
        turns, answers = [], []
        start = prompt_start()
        for turn, (question, answer) in zip(
            talk.turns, exchanges(talk.turns, VISUAL_TOKENS), strict=True
        ):
            ids = torch.tensor([*start, *question, *answer[:-1]])
            visual = ids == token(IMAGE_TOKEN)
            rows = embed(ids)
            if visual.any():
                rows[visual] = features[turn.picture]
            turns.append(Turn(rows=rows, visual=visual, end=len(start) + len(question)))
            answers.append(list(answer[:-1]))
            start = []
        return turns, answers

    def _held(self, turns: Sequence[Turn]) -> Iterator[tuple[float | None, str, Iterator[Told]]]:
        """(budget, method, what each turn told); no method differs before the second turn."""
        yield None, DENSE, self._on(self._first(self.dense, turns), turns, None)
        for budget, schedule in self.schedules.items():
            first = self._first(schedule, turns)
            yield budget, RERANK, self._again(first, turns)
            for name, recall in RECALLS.items():
                yield budget, name, self._on(first, turns, recall)

    def _first(self, schedule: Schedule, turns: Sequence[Turn]) -> Told:
        history = History(self.decoder, schedule)
        return history.run(turns[0]), history

    def _on(self, first: Told, turns: Sequence[Turn], recall: Recall | None) -> Iterator[Told]:
        yield first
        history = first[1].copy()
        for turn in turns[1:]:
            history.cost.clear()
            yield history.run(turn, recall), history

    def _again(self, first: Told, turns: Sequence[Turn]) -> Iterator[Told]:
        """Every turn with all that was said before it; the prefix cache spares what no question changes."""
        yield first
        schedule = first[1].schedule
        dense, rest = schedule.layers[0], schedule.depth - schedule.layers[0]
        front = int(turns[0].visual.nonzero()[0])
        for number in range(1, len(turns)):
            rows = torch.cat([turn.rows for turn in turns[: number + 1]])
            visual = torch.cat([turn.visual for turn in turns[: number + 1]])
            before = sum(len(turn.rows) for turn in turns[:number])
            history = History(self.decoder, schedule)
            whole = Turn(rows=rows, visual=visual, end=before + turns[number].end)
            logits = history.run(whole)
            history.cost.rows -= before * dense + front * rest
            yield logits, history


def schedule_of(budget: float, shape: ModelShape) -> Schedule:
    """As the quality runs serve it."""
    arguments = routed(METHOD, budget, shape).arguments
    options = {
        flag.removeprefix("--reroute-"): value
        for flag, value in zip(arguments[::2], arguments[1::2], strict=True)
    }
    found = RerouteOptions.from_mapping(options).resolve(shape.decoder_layers)
    return Schedule(found.layers, found.keep, shape.decoder_layers)


def by_method(outcomes: Sequence[Outcome]) -> Mapping[tuple[float | None, str], list[Outcome]]:
    """In the order of `outcomes`, the same turns for each."""
    found: dict[tuple[float | None, str], list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault((outcome.budget, outcome.method), []).append(outcome)
    return found
