"""Questions that only training asks: each is a part of a harder one."""

from collections.abc import Callable

import numpy as np

from benchmarks.grounding.questions import DIRECTIONS, NOTHING, Pair
from benchmarks.grounding.scenes import GRID, Scene, cell_name


def where_beside(scene: Scene, rng: np.random.Generator) -> Pair | None:
    """Where the next thing is, without saying what it is."""
    options = [
        (thing, direction, other)
        for thing in scene.things
        for direction, (down, right) in DIRECTIONS.items()
        if (other := scene.thing_at(thing.row + down, thing.column + right))
    ]
    if not options:
        return None
    thing, direction, other = options[rng.integers(len(options))]
    return f"Where is the thing {direction} the {thing.name}?", other.cell


def beside_cell(scene: Scene, rng: np.random.Generator) -> Pair:
    """What is next to a place whose name is given."""
    options = [
        (cell_name(row, column), direction, scene.thing_at(row + down, column + right))
        for row in range(GRID)
        for column in range(GRID)
        for direction, (down, right) in DIRECTIONS.items()
        if 0 <= row + down < GRID and 0 <= column + right < GRID
    ]
    cell, direction, other = options[rng.integers(len(options))]
    return f"What is {direction} {cell}?", other.name if other else NOTHING


def label_at(scene: Scene, rng: np.random.Generator) -> Pair:
    """The label of what is at a place."""
    thing = scene.things[rng.integers(len(scene.things))]
    return f"What is the label of the thing at {thing.cell}?", thing.label


STEPPING_STONES: dict[str, Callable[[Scene, np.random.Generator], Pair | None]] = {
    "where-beside": where_beside,
    "beside-cell": beside_cell,
    "label-at": label_at,
}
