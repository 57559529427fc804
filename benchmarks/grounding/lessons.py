"""Training batches: pictures, packed questions about them, where to look, and what each patch shows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from benchmarks.grounding.guidance import Guide
from benchmarks.grounding.packing import Lines, pack
from benchmarks.grounding.questions import EVERY_KIND, NOTHING, Asked, ask
from benchmarks.grounding.scenes import (
    GRID,
    IMAGE_SIZE,
    PLACE_SIZE,
    Scene,
    render,
    sample_scene,
)
from benchmarks.grounding.vocabulary import (
    ATTRIBUTES,
    CELLS,
    IGNORED,
    IMAGE_TOKEN,
    PARTS,
    PATCH_SIZE,
    answer_tokens,
    attribute_indices,
    prompt_start,
    question_tokens,
    token,
)

LINES, LINE_LENGTH = 5, 56
# A question with its answer takes at least so many tokens.
SHORTEST = 8
COUNT = "count"


@dataclass(frozen=True, kw_only=True)
class Batch:
    pixels: Tensor  # uint8 [pictures, 3, size, size]
    attributes: Tensor  # int64 [pictures, patches, attributes]: indices into vocabulary.ATTRIBUTES
    lines: Lines | None  # None if nothing is asked
    guide: Guide | None  # None too if nobody is told where to look
    kinds: Tensor  # int64 [pictures, questions]: index into EVERY_KIND, -1 none


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a step is about.

    kinds: of questions, each as often as it is named; none if nothing is asked. guided: says where to look.
    """

    pictures: int
    kinds: tuple[str, ...] = ()
    patch_size: int = PATCH_SIZE
    guided: bool = True


class Lessons(Dataset):
    """Step -> its batch. Every step of every worker has scenes of its own."""

    def __init__(self, lesson: Lesson, first_seed: int, worker: int = 0, workers: int = 1) -> None:
        self.lesson, self.first_seed = lesson, first_seed
        self.worker, self.workers = worker, workers

    def __getitem__(self, step: int) -> Batch:
        pictures = self.lesson.pictures
        start = self.first_seed + (step * self.workers + self.worker) * pictures
        return batch_of(range(start, start + pictures), self.lesson)


def batch_of(seeds: Sequence[int], lesson: Lesson) -> Batch:
    """Scenes of those seeds, with random questions about each."""
    scenes = [sample_scene(seed) for seed in seeds]
    attributes = [patch_attributes(scene, lesson.patch_size) for scene in scenes]
    pixels = np.stack([np.asarray(render(scene)) for scene in scenes])
    lines, guide, of_kind = (
        _questions(scenes, attributes, lesson) if lesson.kinds else (None, None, torch.empty(0))
    )
    return Batch(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        attributes=torch.from_numpy(np.stack(attributes)),
        lines=lines,
        guide=guide,
        kinds=of_kind,
    )


def _questions(
    scenes: Sequence[Scene], attributes: Sequence[np.ndarray], lesson: Lesson
) -> tuple[Lines, Guide | None, Tensor]:
    kinds, every_kind = lesson.kinds, list(EVERY_KIND)
    packed, guides, of_kind = [], [], []
    for scene, shown in zip(scenes, attributes, strict=True):
        rng = np.random.default_rng([scene.seed, 3])
        asked: list[tuple[str, Asked]] = []
        while len(asked) < LINES * LINE_LENGTH // SHORTEST:
            kind = kinds[int(rng.integers(len(kinds)))]
            if (found := ask(scene, kind, rng)) is not None:
                asked.append((kind, found))
        words = [(question_tokens(a.text), answer_tokens(a.answer)) for _, a in asked]
        packed.append(pack(words, LINES, LINE_LENGTH))
        if lesson.guided:
            guides.append(_guide(packed[-1], asked, shown))
        laid_out = int(packed[-1]["owner"].max()) + 1
        numbers = [every_kind.index(kind) for kind, _ in asked]
        of_kind.append([*numbers[:laid_out], *[-1] * (len(asked) - laid_out)])
    lines = Lines(**{name: torch.stack([each[name] for each in packed]) for name in packed[0]})
    return lines, _stacked(guides) if guides else None, torch.tensor(of_kind)


def _stacked(guides: Sequence[dict]) -> Guide:
    most = max(len(each["rows"]) for each in guides)
    fill = {"rows": -1, "subject": False, "target": False}
    return Guide(
        **{
            name: torch.from_numpy(np.stack([_padded(each[name], most, value) for each in guides]))
            for name, value in fill.items()
        }
    )


def _guide(fields: dict, asked: list[tuple[str, Asked]], shown: np.ndarray) -> dict:
    """The fields of `Guide` for one picture: a row for every word of an answer but its end."""
    targets, owner = fields["targets"].flatten().numpy(), fields["owner"].flatten().numpy()
    rows = np.flatnonzero((targets != IGNORED) & (targets != token("</s>")))
    first = {number: rows[owner[rows] == number][0] for number in np.unique(owner[rows])}
    looks = [_looks(*asked[int(owner[row])], row - first[owner[row]], shown) for row in rows]
    subject, target = map(np.stack, zip(*looks, strict=True))
    return {"rows": rows, "subject": subject, "target": target}


def _looks(kind: str, question: Asked, word: int, shown: np.ndarray) -> list[np.ndarray]:
    """Bool [start] twice: where subject and target are when that word of the answer is to be said.

    Counting names places in turn: its subject is all that are left, its target the next one. Where nothing is left,
    it looks at the first token of the prompt.
    """
    subject, target = question.subject, question.target
    if kind == COUNT:
        subject, target = target[word:], target[word : word + 1]
    nothing = np.arange(len(prompt_start(len(shown)))) == 0
    return [tokens_of(places, shown) if places else nothing for places in (subject, target)]


def tokens_of(places: Sequence[tuple[int, int]], shown: np.ndarray) -> np.ndarray:
    """Bool [start]: the tokens that show those places' things, or all of a place if it is empty."""
    start = prompt_start(len(shown))
    first = start.index(token(IMAGE_TOKEN))
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
    tokens = np.zeros(len(start), dtype=bool)
    tokens[first : first + len(shown)] = patches.flatten()
    return tokens


def _padded(rows: np.ndarray, most: int, value: int | bool) -> np.ndarray:
    width = [(0, most - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
    return np.pad(rows, width, constant_values=value)


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
