"""The learning curve and the model card."""

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

from torch import Tensor

from benchmarks.grounding.lessons import EVERY_TURN
from benchmarks.grounding.recipe import Recipe
from benchmarks.grounding.vocabulary import ATTRIBUTES

COLUMNS = (
    "phase", "step", "cpu_s", "loss", "guidance_loss", "naming_loss",
    *(f"names_{name}" for name in ATTRIBUTES),
)  # fmt: skip


class Curve:
    """Means since the last row, over fresh training pictures (none is ever seen twice)."""

    def __init__(self, kinds: Sequence[str]) -> None:
        """kinds: of questions that have a column."""
        self.kinds = kinds
        self.rows: list[dict[str, str]] = []
        self._clear()

    def _clear(self) -> None:
        self.answering: list[list[float]] = []
        self.naming: list[list[float]] = []
        self.asked = [0] * len(EVERY_TURN)
        self.right = [0] * len(EVERY_TURN)

    def add_naming(self, loss: Tensor, shares: Tensor) -> None:
        self.naming.append([loss.item(), *shares.tolist()])

    def add_answers(self, loss: Tensor, guidance: Tensor, asked: Tensor, right: Tensor) -> None:
        self.answering.append([loss.item(), guidance.item()])
        self.asked = [a + b for a, b in zip(self.asked, asked.tolist(), strict=True)]
        self.right = [a + b for a, b in zip(self.right, right.tolist(), strict=True)]

    def close(self, phase: str, step: int) -> str:
        """Appends the row of that step and returns it as a line to print."""
        answering = _means(self.answering) or ["", ""]
        every = zip(EVERY_TURN, self.right, self.asked, strict=True)
        shares = {kind: f"{r / a:.3f}" if a else "" for kind, r, a in every if kind in self.kinds}
        cpu_s = f"{time.process_time():.0f}"
        values = (phase, str(step), cpu_s, *answering, *_means(self.naming))
        self.rows.append(dict(zip(COLUMNS, values, strict=True)) | shares)
        self._clear()
        return " ".join(f"{k}={v}" for k, v in self.rows[-1].items() if v)


def _means(rows: list[list[float]]) -> list[str]:
    return [f"{sum(column) / len(column):.3f}" for column in zip(*rows, strict=True)]


def write_curve(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_card(
    recipe: Recipe,
    shares: Mapping[str, float],
    asked: int,
    done: Mapping[str, int],
    rows: list[dict[str, str]],
    talks: Mapping[str, float] | None = None,
    talks_held: int = 0,
) -> None:
    """shares: exact answers to single questions by kind. talks: likewise in conversations, by how a turn follows."""
    folder = recipe.folder
    write_curve(folder / "curve.csv", rows)
    story, shape = recipe.story, recipe.shape
    about = (
        f"A LLaVA-1.5 (CLIP tower, projector, {shape.text_layers}-layer Llama decoder, {shape.patches**2} visual "
        "tokens) small enough to be trained on two CPU cores. It answers questions about rendered scenes of labelled "
        f"shapes, and nothing else. {story.about}"
    )
    seeing = (
        "the weights of the guided model, then "
        if recipe.seeing is None
        else f"{done['seeing']} steps in which the tower learns to name what each patch shows, then "
    )
    questions = "conversations and single questions" if talks else "questions"
    training = (
        f"`{story.command}`, seed 0: {seeing}{done['answering']} steps of {questions}, many about a picture in one "
        f"pass, none seeing another, {story.tower}. Token routing has no part in training. `curve.csv` holds the "
        "learning curve (fresh training pictures)."
    )
    paragraphs = {"about": about, "training": training, "looking": story.looking}
    filled = {name: fill(text, 119, break_on_hyphens=False) for name, text in paragraphs.items()}
    held = "" if talks is None else TALKS.format(table=_table(talks), count=talks_held)
    card = CARD.format(title=story.title, table=_table(shares), asked=asked, talks=held, **filled)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _table(shares: Mapping[str, float]) -> str:
    return "\n".join(f"| {kind} | {100 * share:.1f} % |" for kind, share in shares.items())


TALKS = """
## Exact answers in conversations
{count} conversations of two to four turns of the test split (`conversations.py`), each turn behind the model's own
earlier answers, likewise.

| turn | exact |
|---|---|
{table}
"""
CARD = """---
license: apache-2.0
pipeline_tag: image-text-to-text
---
# {title}

{about}

## Data
Scenes from `benchmarks/grounding/scenes.py`: 5 to 9 labelled, coloured shapes on a 4x4 grid of places, on crops of
four photographs that scikit-image ships (public domain or CC0), clouds or stripes, with clutter. Questions from
`benchmarks/grounding/questions.py`. Train, validation and test use disjoint ranges of scene seeds.

## Training
{training}

{looking}

## Exact answers
Greedy, {asked} questions of the test split, weights as saved (bf16), computed in fp32.

| kind | exact |
|---|---|
{table}
{talks}
## Licence
Apache-2.0.
"""
