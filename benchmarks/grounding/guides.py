"""Where each word of an answer is read from, as `Guide` has it."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.grounding.conversations import Turn
from benchmarks.grounding.guidance import Guide
from benchmarks.grounding.questions import NOTHING, Place
from benchmarks.grounding.scenes import GRID
from benchmarks.grounding.vocabulary import (
    ATTRIBUTES,
    IGNORED,
    IMAGE_TOKEN,
    PARTS,
    prompt_start,
    token,
)

COUNT = "count"


def stacked(guides: Sequence[dict]) -> Guide:
    most = max(len(each["rows"]) for each in guides)
    fill = {"rows": -1, "subject": False, "target": False}
    return Guide(
        **{
            name: torch.from_numpy(np.stack([_padded(each[name], most, value) for each in guides]))
            for name, value in fill.items()
        }
    )


def guide(fields: dict, turns: Sequence[Turn], shown: Sequence[np.ndarray]) -> dict:
    """The fields of `Guide` for one picture: a row for every word of an answer but its end.

    fields: as `pack` gives them. turns: by the number of their question. shown: attributes of the patches, of this
    picture and the one that a later turn may bring.
    """
    flat = {name: values.flatten().numpy() for name, values in fields.items()}
    targets, question = flat["targets"], flat["question"]
    rows = np.flatnonzero((targets != IGNORED) & (targets != token("</s>")))
    first = {number: rows[question[rows] == number][0] for number in np.unique(question[rows])}
    second = flat["ids"] == token(IMAGE_TOKEN)
    looks = []
    for row in rows:
        turn = turns[question[row]]
        for places in _looks(turn, row - first[question[row]]):
            tokens = np.zeros(len(prompt_start(len(shown[0]))) + len(second) * second.any(), bool)
            if not places:
                tokens[0] = True
            elif turn.picture == 0:
                start = tokens_of(places, shown[0])
                tokens[: len(start)] = start
            else:
                tokens[-len(second) :][second] = patches_of(places, shown[1])
            looks.append(tokens)
    return {"rows": rows, "subject": np.stack(looks[::2]), "target": np.stack(looks[1::2])}


def _looks(turn: Turn, word: int) -> tuple[Sequence[Place], Sequence[Place]]:
    """Subject and target when that word of the answer is to be said.

    Counting names places in turn: its subject is all that are left, its target the next one. Where nothing is left,
    it looks at the first token of the prompt.
    """
    subject, target = turn.asked.subject, turn.asked.target
    if turn.question == COUNT:
        return target[word:], target[word : word + 1]
    return subject, target


def tokens_of(places: Sequence[Place], shown: np.ndarray) -> np.ndarray:
    """Bool [start]: the tokens that show those places' things, or all of a place if it is empty."""
    start = prompt_start(len(shown))
    first = start.index(token(IMAGE_TOKEN))
    tokens = np.zeros(len(start), dtype=bool)
    tokens[first : first + len(shown)] = patches_of(places, shown)
    return tokens


def patches_of(places: Sequence[Place], shown: np.ndarray) -> np.ndarray:
    """Bool [patches], likewise."""
    side = math.isqrt(len(shown))
    per_place = side // GRID
    part = shown[:, list(ATTRIBUTES).index("part")].reshape(side, side)
    patches = np.zeros((side, side), dtype=bool)
    for row, column in places:
        place = (
            slice(row * per_place, (row + 1) * per_place),
            slice(column * per_place, (column + 1) * per_place),
        )
        thing = part[place] != PARTS.index(NOTHING)
        patches[place] = thing if thing.any() else True
    return patches.flatten()


def _padded(rows: np.ndarray, most: int, value: int | bool) -> np.ndarray:
    width = [(0, most - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
    return np.pad(rows, width, constant_values=value)
