"""Scenes and questions: the same every time, splits apart, answers right by a second opinion."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.grounding.questions import EVERY_KIND, HALVES, KINDS, SPLITS, ask, questions
from benchmarks.grounding.scenes import (
    COLOUR_JITTER,
    COLOURS,
    IMAGE_SIZE,
    LABELS,
    PLACE_SIZE,
    SHAPES,
    render,
    sample_scene,
)
from tests.unit.second_opinion import second_opinion

SCENES = [sample_scene(seed) for seed in range(300)]


def test_the_same_questions_every_time():
    first, second = list(questions("test", 18)), list(questions("test", 18))
    for one, other in zip(first, second, strict=True):
        assert (one.text, one.answer, one.kind, one.scene_seed) == (
            other.text,
            other.answer,
            other.kind,
            other.scene_seed,
        )
        assert one.image.tobytes() == other.image.tobytes()


@pytest.mark.parametrize("kinds", [None, tuple(HALVES)])
def test_kinds_are_balanced_and_scenes_never_repeat(kinds):
    wanted = kinds or KINDS
    asked = list(questions("validation", 4 * len(wanted), kinds))
    assert set(Counter(question.kind for question in asked).values()) == {4}
    assert {question.kind for question in asked} == set(wanted)
    assert len({question.scene_seed for question in asked}) == len(asked)


def test_splits_share_no_scene():
    seeds = sorted(SPLITS.values(), key=lambda seeds: seeds.start)
    assert all(one.stop <= other.start for one, other in pairwise(seeds))
    for split in SPLITS:
        assert all(question.scene_seed in SPLITS[split] for question in questions(split, 9))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="validation"):
        next(questions("holdout", 1))


def test_things_lie_inside_their_places_and_differ():
    for scene in SCENES[:60]:
        assert len({thing.cell for thing in scene.things}) == len(scene.things), scene
        assert len({thing.name for thing in scene.things}) == len(scene.things), scene
        assert len({thing.label for thing in scene.things}) == len(scene.things), scene
        for thing in scene.things:
            for centre, place in zip(thing.centre, (thing.column, thing.row), strict=True):
                assert place * PLACE_SIZE <= centre - thing.radius, thing
                assert centre + thing.radius <= (place + 1) * PLACE_SIZE, thing


def test_pictures_show_the_colours_of_things():
    """Around its middle a thing has its colour more often than any other, but for the ink of its label."""
    checked = 0
    for scene in SCENES[:40]:
        pixels = np.asarray(render(scene)).astype(int)
        assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        for thing in scene.things:
            x, y = (round(c) for c in thing.centre)
            reach = int(0.4 * thing.radius)
            around = pixels[y - reach : y + reach + 1, x - reach : x + reach + 1].reshape(-1, 3)
            seen = {
                colour: (np.abs(around - value).max(axis=1) <= COLOUR_JITTER).mean()
                for colour, value in COLOURS.items()
                if colour == thing.colour or colour not in ("black", "white")
            }
            assert max(seen, key=seen.get) == thing.colour, thing
            assert seen[thing.colour] > 0.1, thing
            checked += 1
    assert checked > 200


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_answers_agree_with_a_second_opinion(kind):
    asked = 0
    for scene in SCENES:
        pair = ask(scene, kind, np.random.default_rng(scene.seed))
        if pair is not None:
            assert second_opinion(scene, pair[0]) == {pair[1]}
            asked += 1
    assert asked > 0.7 * len(SCENES)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_no_answer_is_common(kind):
    """Nothing can be won by always saying the same."""
    said = Counter(
        pair[1]
        for scene in SCENES
        if (pair := ask(scene, kind, np.random.default_rng(scene.seed))) is not None
    )
    most = {"count": 0.5, "beside": 0.3, "at": 0.3, "beside-place": 0.3}.get(kind, 0.15)
    assert max(said.values()) < most * sum(said.values())


def test_labels_and_shapes_are_distinct_words():
    assert len({*LABELS, *SHAPES, *COLOURS}) == len(LABELS) + len(SHAPES) + len(COLOURS)
