"""Questions about scenes, each with exactly one right answer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.grounding.scenes import (
    COLOURS,
    GRID,
    SHAPES,
    Scene,
    Thing,
    cell_name,
    render,
    sample_scene,
)

# Scene seeds of each split.
SPLITS: dict[str, range] = {
    "train": range(0, 10**9),
    "validation": range(10**9, 2 * 10**9),
    "test": range(2 * 10**9, 3 * 10**9),
}
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (-1, 0),
    "below": (1, 0),
}
NOTHING, NOWHERE = "nothing", "nowhere"
# How often a place that is asked about is an empty one, where the scene allows both.
EMPTY_SHARE = 0.2
# Largest and smallest are asked for only if the next in size differs by this factor.
CLEAR_MARGIN = 1.15
# Tokens of the longest answer where every word is one, with its end: "a1 a2 ...: 8".
ANSWER_TOKENS = 12

Place = tuple[int, int]  # row, column


class Asked(NamedTuple):
    """A question about a scene, its answer, and where one has to look for it.

    subject: the places the words name. target: the places the answer is read from, often the same. An answer that
    names places names the target's in turn.
    """

    text: str
    answer: str
    subject: tuple[Place, ...]
    target: tuple[Place, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    image: Image.Image
    text: str
    answer: str
    kind: str
    scene_seed: int


def questions(split: str, count: int, kinds: Sequence[str] | None = None) -> Iterator[Question]:
    """`count` questions of a split, kinds (all in KINDS) in turn, every question about a scene of its own."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown. Choose one of: {', '.join(SPLITS)}.")
    kinds = list(kinds or KINDS)
    seeds = iter(SPLITS[split])
    for number in range(count):
        kind = kinds[number % len(kinds)]
        while True:
            scene = sample_scene(next(seeds))
            asked = ask(scene, kind, np.random.default_rng([scene.seed, 2]))
            if asked is not None:
                break
        yield Question(
            image=render(scene),
            text=asked.text,
            answer=asked.answer,
            kind=kind,
            scene_seed=scene.seed,
        )


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Asked | None:
    """A random question of that kind with its answer; None if the scene allows none."""
    return EVERY_KIND[kind](scene, rng)


def _of(text: str, answer: str, *things: Thing) -> Asked:
    """A question all of whose words and answer are about the same things."""
    places = tuple((thing.row, thing.column) for thing in things)
    return Asked(text, answer, places, places)


def _where(scene: Scene, rng: np.random.Generator) -> Asked:
    thing = _any(scene.things, rng)
    return _of(f"Where is the {thing.name}?", thing.cell, thing)


def _at(scene: Scene, rng: np.random.Generator) -> Asked:
    places = [(row, column) for row in range(GRID) for column in range(GRID)]
    place, thing = maybe_empty([(place, scene.thing_at(*place)) for place in places], rng)
    answer = thing.name if thing else NOTHING
    return Asked(f"What is at {cell_name(*place)}?", answer, (place,), (place,))


def _label(scene: Scene, rng: np.random.Generator) -> Asked:
    thing = _any(scene.things, rng)
    return _of(f"What is the label of the {thing.name}?", thing.label, thing)


def _labelled(scene: Scene, rng: np.random.Generator) -> Asked:
    thing = _any(scene.things, rng)
    return _of(f"What has the label {thing.label}?", thing.name, thing)


def _count(scene: Scene, rng: np.random.Generator) -> Asked:
    if rng.random() < 0.5:
        number = rng.integers(len(SHAPES) + 2)
        # Two of eight times a shape that is there for sure.
        shape = SHAPES[number] if number < len(SHAPES) else _any(scene.things, rng).shape
        counted = [thing for thing in scene.things if thing.shape == shape]
        return _places_and_number(plural(shape), counted)
    number = rng.integers(len(COLOURS) + 4)
    colour = list(COLOURS)[number] if number < len(COLOURS) else _any(scene.things, rng).colour
    counted = [thing for thing in scene.things if thing.colour == colour]
    return _places_and_number(f"{colour} things", counted)


def _places_and_number(words: str, counted: list[Thing]) -> Asked:
    """Counting aloud: "b2 c4: 2" needs one look for each thing, a bare "2" all of them in one."""
    cells = " ".join(thing.cell for thing in counted) or NOWHERE
    return _of(f"Where are the {words}, and how many?", f"{cells}: {len(counted)}", *counted)


def _beside(scene: Scene, rng: np.random.Generator) -> Asked | None:
    options = [(d, t, p, scene.thing_at(*p)) for d, t, p in _neighbours(scene, scene.things)]
    direction, thing, place, other = maybe_empty(options, rng)
    return Asked(
        f"What is {direction} the {thing.name}?",
        other.name if other else NOTHING,
        ((thing.row, thing.column),),
        (place,),
    )


def _where_beside(scene: Scene, rng: np.random.Generator) -> Asked | None:
    options = [
        (direction, thing, other)
        for direction, thing, place in _neighbours(scene, scene.things)
        if (other := scene.thing_at(*place))
    ]
    if not options:
        return None
    direction, thing, other = options[rng.integers(len(options))]
    # The other's place follows from the first one's: nobody has to look there.
    place = ((thing.row, thing.column),)
    return Asked(f"Where is the thing {direction} the {thing.name}?", other.cell, place, place)


def _beside_place(scene: Scene, rng: np.random.Generator) -> Asked:
    options = [
        (direction, (row, column), place, scene.thing_at(*place))
        for row in range(GRID)
        for column in range(GRID)
        for direction, place in next_places(row, column)
    ]
    direction, start, place, other = maybe_empty(options, rng)
    answer = other.name if other else NOTHING
    return Asked(f"What is {direction} {cell_name(*start)}?", answer, (place,), (place,))


def _beside_label(scene: Scene, rng: np.random.Generator) -> Asked | None:
    options = [
        (f"{direction} the {thing.name}", thing, other)
        for direction, thing, place in _neighbours(scene, scene.things)
        if (other := scene.thing_at(*place))
    ]
    return _label_of_neighbour(options, rng)


def _largest(scene: Scene, rng: np.random.Generator) -> Asked | None:
    options = clear_extremes(scene)
    if not options:
        return None
    which, thing = options[rng.integers(len(options))]
    return _of(f"Where is the {which} {thing.shape}?", thing.cell, thing)


def _largest_beside(scene: Scene, rng: np.random.Generator) -> Asked | None:
    options = [
        (f"{direction} the {which} {thing.shape}", thing, other)
        for which, extreme in clear_extremes(scene)
        for direction, thing, place in _neighbours(scene, (extreme,))
        if (other := scene.thing_at(*place))
    ]
    return _label_of_neighbour(options, rng)


def _label_of_neighbour(options: list, rng: np.random.Generator) -> Asked | None:
    """options: (words for the neighbour, thing it is beside, neighbour)."""
    if not options:
        return None
    words, thing, other = options[rng.integers(len(options))]
    return Asked(
        f"What is the label of the thing {words}?",
        other.label,
        ((thing.row, thing.column),),
        ((other.row, other.column),),
    )


# Kind -> what makes a question of it.
KINDS: dict[str, Callable[[Scene, np.random.Generator], Asked | None]] = {
    "where": _where,
    "at": _at,
    "label": _label,
    "labelled": _labelled,
    "count": _count,
    "largest": _largest,
    "beside": _beside,
    "beside-label": _beside_label,
    "largest-beside": _largest_beside,
}
# They need one visual token to know which other one to look at.
TWO_LOOKS = ("beside", "beside-label", "largest-beside")
# The two halves of "beside", one look each: a neighbour's place from a thing, and a thing from its neighbour's place.
HALVES: dict[str, Callable[[Scene, np.random.Generator], Asked | None]] = {
    "where-beside": _where_beside,
    "beside-place": _beside_place,
}
EVERY_KIND = {**KINDS, **HALVES}


def clear_extremes(scene: Scene) -> list[tuple[str, Thing]]:
    """("largest" or "smallest", thing) for each shape that occurs several times with one clearly at that end."""
    found = []
    for shape in SHAPES:
        by_size = sorted((t for t in scene.things if t.shape == shape), key=lambda t: t.radius)
        if len(by_size) < 2:
            continue
        if by_size[-1].radius >= CLEAR_MARGIN * by_size[-2].radius:
            found.append(("largest", by_size[-1]))
        if by_size[0].radius * CLEAR_MARGIN <= by_size[1].radius:
            found.append(("smallest", by_size[0]))
    return found


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _any(things: tuple[Thing, ...], rng: np.random.Generator) -> Thing:
    return things[rng.integers(len(things))]


def _neighbours(scene: Scene, things: tuple[Thing, ...]) -> list:
    """(direction, thing, (row, column) of the next place that way) for all places inside the grid."""
    return [
        (direction, thing, place)
        for thing in things
        for direction, place in next_places(thing.row, thing.column)
    ]


def next_places(row: int, column: int) -> list[tuple[str, Place]]:
    """(direction, next place that way), where it is inside the grid."""
    return [
        (direction, (row + down, column + right))
        for direction, (down, right) in DIRECTIONS.items()
        if 0 <= row + down < GRID and 0 <= column + right < GRID
    ]


def maybe_empty(options: list, rng: np.random.Generator) -> tuple:
    """One of `options`, whose last item is a thing or None: None for EMPTY_SHARE of all, if both occur."""
    full = [option for option in options if option[-1] is not None]
    empty = [option for option in options if option[-1] is None]
    chosen = empty if not full or (empty and rng.random() < EMPTY_SHARE) else full
    return chosen[rng.integers(len(chosen))]
