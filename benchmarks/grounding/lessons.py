"""Training batches: pictures, packed questions about them, where to look, and what each patch shows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from benchmarks.grounding.conversations import LENGTHS, TURN_KINDS, Turn, converse
from benchmarks.grounding.guidance import Guide
from benchmarks.grounding.guides import guide, stacked
from benchmarks.grounding.packing import Exchange, Lines, pack
from benchmarks.grounding.questions import EVERY_KIND, ask
from benchmarks.grounding.scenes import (
    GRID,
    IMAGE_SIZE,
    PLACE_SIZE,
    Scene,
    render,
    sample_scene,
)
from benchmarks.grounding.vocabulary import (
    CELLS,
    PATCH_SIZE,
    answer_tokens,
    attribute_indices,
    next_question_tokens,
    question_tokens,
)

# Lines and their length: of questions one by one, of conversations, and where these bring a second picture.
ALONE, TALKS = (5, 56), (3, 96)
TWO_PICTURES_LENGTH = 96
# A question with its answer takes at least so many tokens.
SHORTEST = 8
# In lessons with conversations every so many-th step is of those with a second picture.
TWO_PICTURES_EVERY = 3
# What `Batch.kinds` counts through: a turn of a conversation by how it follows, a single question by what it asks.
EVERY_TURN = (*EVERY_KIND, *TURN_KINDS)


@dataclass(frozen=True, kw_only=True)
class Batch:
    pixels: Tensor  # uint8 [pictures, 3, size, size]
    attributes: Tensor  # int64 [pictures, patches, attributes]: indices into vocabulary.ATTRIBUTES
    lines: Lines | None  # None if nothing is asked
    guide: Guide | None  # None too if nobody is told where to look
    kinds: Tensor  # int64 [pictures, questions]: index into EVERY_TURN, -1 none


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a step is about.

    kinds: of single questions, each as often as it is named; none if nothing is asked. guided: says where to look.
    talks: every second question begins a conversation.
    """

    pictures: int
    kinds: tuple[str, ...] = ()
    patch_size: int = PATCH_SIZE
    guided: bool = True
    talks: bool = False


class Lessons(Dataset):
    """Step -> its batch. Every step of every worker has scenes of its own."""

    def __init__(self, lesson: Lesson, first_seed: int, worker: int = 0, workers: int = 1) -> None:
        self.lesson, self.first_seed = lesson, first_seed
        self.worker, self.workers = worker, workers

    def __getitem__(self, step: int) -> Batch:
        pictures = self.lesson.pictures
        start = self.first_seed + (step * self.workers + self.worker) * pictures
        two = self.lesson.talks and step % TWO_PICTURES_EVERY == TWO_PICTURES_EVERY - 1
        return batch_of(range(start, start + pictures), self.lesson, two)


def batch_of(seeds: Sequence[int], lesson: Lesson, two_pictures: bool = False) -> Batch:
    """Scenes of those seeds, with random questions about each, or with a conversation about it and the next one."""
    scenes = [sample_scene(seed) for seed in seeds]
    attributes = [patch_attributes(scene, lesson.patch_size) for scene in scenes]
    pixels = np.stack([np.asarray(render(scene)) for scene in scenes])
    lines, where, of_kind = (
        _questions(scenes, attributes, lesson, two_pictures)
        if lesson.kinds
        else (None, None, torch.empty(0))
    )
    return Batch(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        attributes=torch.from_numpy(np.stack(attributes)),
        lines=lines,
        guide=where,
        kinds=of_kind,
    )


def _questions(
    scenes: Sequence[Scene], attributes: Sequence[np.ndarray], lesson: Lesson, two_pictures: bool
) -> tuple[Lines, Guide | None, Tensor]:
    number, length = TALKS if lesson.talks else ALONE
    if two_pictures:
        number, length = 1, TWO_PICTURES_LENGTH + len(attributes[0])
    packed, guide_of, of_kind = [], [], []
    for first in range(len(scenes)):
        second = (first + 1) % len(scenes)
        rng = np.random.default_rng([scenes[first].seed, 3])
        talks: list[Sequence[Turn]] = []
        if two_pictures:
            talks.append(_two_pictures(scenes[first], scenes[second], rng))
        while sum(map(len, talks)) < number * length // SHORTEST:
            talks.append(_about(scenes[first], lesson, rng))
        words = [exchanges(talk, len(attributes[first])) for talk in talks]
        packed.append(pack(words, number, length))
        turns = [turn for talk in talks for turn in talk]
        if lesson.guided:
            shown = (attributes[first], attributes[second])
            guide_of.append(guide(packed[-1], turns, shown))
        laid_out = int(packed[-1]["question"].max()) + 1
        numbers = [EVERY_TURN.index(turn.kind) for turn in turns]
        of_kind.append(numbers[:laid_out])
    lines = Lines(**{name: torch.stack([each[name] for each in packed]) for name in packed[0]})
    most = max(map(len, of_kind))
    kinds = torch.tensor([[*each, *[-1] * (most - len(each))] for each in of_kind])
    return lines, stacked(guide_of) if guide_of else None, kinds


def _about(scene: Scene, lesson: Lesson, rng: np.random.Generator) -> Sequence[Turn]:
    """A single question about the scene, or a conversation."""
    while True:
        if lesson.talks and rng.random() < 0.5:
            found = converse([scene], int(rng.choice(LENGTHS)), rng)
            if found is not None:
                return found.turns
        kind = lesson.kinds[int(rng.integers(len(lesson.kinds)))]
        if (asked := ask(scene, kind, rng)) is not None:
            return (Turn(kind=kind, question=kind, asked=asked, picture=0),)


def _two_pictures(first: Scene, second: Scene, rng: np.random.Generator) -> Sequence[Turn]:
    while True:
        found = converse([first, second], int(rng.choice(LENGTHS)), rng)
        if found is not None:
            return found.turns


def exchanges(turns: Sequence[Turn], visual: int) -> list[Exchange]:
    """A conversation's token ids behind its prompt start. visual: tokens of a picture."""
    found = []
    for number, turn in enumerate(turns):
        text, answer = turn.asked.text, answer_tokens(turn.asked.answer)
        if number == 0:
            question = question_tokens(text)
        else:
            new_picture = turn.picture != turns[number - 1].picture
            question = next_question_tokens(text, visual * new_picture)
        found.append((question, answer))
    return found


def patch_attributes(scene: Scene, patch_size: int = PATCH_SIZE) -> np.ndarray:
    """Per patch in reading order, the right word of each attribute: int64 [patches, attributes].

    A patch shows a thing if its middle lies in it, or the thing's middle in the patch.
    """
    side, per_place = IMAGE_SIZE // patch_size, PLACE_SIZE // patch_size
    shown = []
    for patch in range(side * side):
        row, column = divmod(patch, side)
        thing = scene.thing_at(row // per_place, column // per_place)
        part = "edge"
        if thing is not None:
            x, y = (column + 0.5) * patch_size, (row + 0.5) * patch_size
            if (thing.centre[0] // patch_size, thing.centre[1] // patch_size) == (column, row):
                part = "centre"
            elif np.hypot(x - thing.centre[0], y - thing.centre[1]) > thing.radius:
                thing = None
        cell = CELLS[row // per_place * GRID + column // per_place]
        shown.append(attribute_indices(cell, thing, part))
    return np.array(shown)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, height, width] -> fp32, as CLIP's image processor does."""
    mean = torch.tensor(OPENAI_CLIP_MEAN)[:, None, None]
    std = torch.tensor(OPENAI_CLIP_STD)[:, None, None]
    return (pixels.float() / 255 - mean) / std
