"""Training batches: pictures, packed questions about them, and what each patch shows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from benchmarks.grounding.packing import Lines, pack
from benchmarks.grounding.questions import KINDS
from benchmarks.grounding.scenes import GRID, Scene, render, sample_scene
from benchmarks.grounding.stepping_stones import STEPPING_STONES
from benchmarks.grounding.vocabulary import (
    CELLS,
    PATCH_SIZE,
    PATCHES,
    answer_tokens,
    attribute_indices,
    question_tokens,
    word,
)

LINE_LENGTH = 56
FACT = "fact"
TAUGHT = (*KINDS, *STEPPING_STONES, FACT)
ONE_HOP = tuple(KINDS)[:4]


@dataclass(frozen=True, kw_only=True)
class Batch:
    pixels: Tensor  # uint8 [pictures, 3, size, size]
    attributes: Tensor  # int64 [pictures, patches, attributes]: indices into vocabulary.ATTRIBUTES
    lines: Lines | None  # of the first pictures; None if nothing is asked
    kinds: Tensor  # int64 [asked, questions]: index into TAUGHT, -1 none


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A number of steps on questions of these kinds, each kind as often as it is named."""

    steps: int
    pictures: int
    # How many of the pictures are asked about; the others are only looked at.
    asked: int = 0
    kinds: tuple[str, ...] = ()
    lines: int = 0


class Lessons(Dataset):
    """Step -> its batch. Every step of every worker has scenes of its own."""

    def __init__(self, stage: Stage, first_seed: int, worker: int = 0, workers: int = 1) -> None:
        self.stage, self.first_seed = stage, first_seed
        self.worker, self.workers = worker, workers

    def __getitem__(self, step: int) -> Batch:
        pictures = self.stage.pictures
        start = self.first_seed + (step * self.workers + self.worker) * pictures
        return batch_of(range(start, start + pictures), self.stage)


def batch_of(seeds: Sequence[int], stage: Stage) -> Batch:
    """Scenes of those seeds, with random questions about the first `stage.asked` of them."""
    scenes = [sample_scene(seed) for seed in seeds]
    packed, asked = [], []
    for scene in scenes[: stage.asked]:
        exchanges, of_kind = _exchanges(scene, stage.kinds, stage.lines)
        packed.append(pack(exchanges, stage.lines, LINE_LENGTH))
        laid_out = int(packed[-1]["owner"].max()) + 1
        asked.append([*of_kind[:laid_out], *[-1] * (len(of_kind) - laid_out)])
    names = packed[0] if packed else ()
    pixels = np.stack([np.asarray(render(scene)) for scene in scenes])
    return Batch(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        attributes=torch.tensor([patch_attributes(scene) for scene in scenes]),
        lines=Lines(**{n: torch.stack([each[n] for each in packed]) for n in names})
        if names
        else None,
        kinds=torch.tensor(asked),
    )


def _exchanges(scene: Scene, kinds: Sequence[str], lines: int) -> tuple[list, list[int]]:
    """More (question, answer) token pairs than fit, kinds in random order, and the kind of each."""
    rng = np.random.default_rng([scene.seed, 3])
    exchanges, of_kind = [], []
    most = lines * LINE_LENGTH // (4 if FACT in kinds else 8)
    while len(exchanges) < most:
        kind = kinds[rng.integers(len(kinds))]
        if kind == FACT:
            words = fact(scene, rng)
            exchanges.append((words[:1], words[1:]))
            of_kind.append(TAUGHT.index(kind))
            continue
        pair = (STEPPING_STONES.get(kind) or KINDS[kind])(scene, rng)
        if pair is not None:
            exchanges.append((question_tokens(pair[0]), answer_tokens(pair[1])))
            of_kind.append(TAUGHT.index(kind))
    return exchanges, of_kind


def fact(scene: Scene, rng: np.random.Generator) -> tuple[int, ...]:
    """The tokens of cell, colour, shape and label of a thing, in any order: whatever comes first tells the rest."""
    thing = scene.things[rng.integers(len(scene.things))]
    words = [thing.cell, thing.colour, thing.shape, thing.label]
    return tuple(word(words[i]) for i in rng.permutation(len(words)))


def patch_attributes(scene: Scene) -> list[list[int]]:
    """Per patch in reading order, the right word of each attribute. A patch shows a thing if its middle lies in it."""
    shown = []
    for patch in range(PATCHES * PATCHES):
        row, column = divmod(patch, PATCHES)
        per_place = PATCHES // GRID
        thing = scene.thing_at(row // per_place, column // per_place)
        if thing is not None:
            x, y = (column + 0.5) * PATCH_SIZE, (row + 0.5) * PATCH_SIZE
            if np.hypot(x - thing.centre[0], y - thing.centre[1]) > thing.radius:
                thing = None
        cell = CELLS[row // per_place * GRID + column // per_place]
        shown.append(attribute_indices(cell, thing))
    return shown


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, height, width] -> fp32, as CLIP's image processor does."""
    mean = torch.tensor(OPENAI_CLIP_MEAN)[:, None, None]
    std = torch.tensor(OPENAI_CLIP_STD)[:, None, None]
    return (pixels.float() / 255 - mean) / std
