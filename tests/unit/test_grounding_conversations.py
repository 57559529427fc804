"""Conversations: the same every time, splits apart, "it" without doubt, answers right by a second opinion."""

import re
from collections import Counter

import pytest

from benchmarks.grounding.conversations import (
    BESIDE_IT,
    FIRST,
    LENGTHS,
    NEW_PICTURE,
    OTHER,
    PICTURE_EVERY,
    SAME,
    TURN_KINDS,
    conversations,
)
from benchmarks.grounding.questions import KINDS, SPLITS
from benchmarks.grounding.scenes import COLOURS
from tests.unit.second_opinion import second_opinion

TALKS = list(conversations("train", 600))
# How each question that names just one thing names it. None: a question with "it", which goes on about the same.
NAMES = (
    r"Where is (the .+)\?",
    r"What is the label of (the \w+ \w+)\?",
    r"What has (the label \w)\?",
    r"What is (at \w\d)\?",
    r"What is (?:left of|right of|above|below) (the \w+ \w+)\?",
)


def things_drawn(scene, words: str) -> list:
    """All things that a name could mean."""
    if words.startswith("at "):
        (answer,) = second_opinion(scene, f"What is {words}?")
        return [thing for thing in scene.things if thing.name == answer]
    if words.startswith("the label "):
        (answer,) = second_opinion(scene, f"What has {words}?")
        return [thing for thing in scene.things if thing.name == answer]
    (cell,) = second_opinion(scene, f"Where is {words}?")
    return [thing for thing in scene.things if thing.cell == cell]


def named_in(text: str) -> str | None:
    if "the thing" in text:
        return None
    return next((found[1] for name in NAMES if (found := re.fullmatch(name, text))), None)


def test_the_same_conversations_every_time_and_few_are_the_first_of_more():
    few, more = list(conversations("test", 12)), list(conversations("test", 30))
    assert few == more[:12]


def test_splits_share_no_scene_and_scenes_never_repeat():
    for split, seeds in SPLITS.items():
        used = [s.seed for talk in conversations(split, 60) for s in talk.scenes]
        assert len(used) == len(set(used))
        assert all(seed in seeds for seed in used)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="validation"):
        next(conversations("holdout", 1))


def test_lengths_pictures_and_kinds_of_turns_are_mixed():
    assert {len(talk.turns) for talk in TALKS} == set(LENGTHS)
    assert sum(len(talk.scenes) == 2 for talk in TALKS) == len(TALKS) // PICTURE_EVERY
    kinds = Counter(turn.kind for talk in TALKS for turn in talk.turns)
    assert set(kinds) == set(TURN_KINDS)
    assert min(kinds.values()) > 0.08 * sum(kinds.values())
    assert {talk.turns[0].question for talk in TALKS} == set(KINDS)
    others = {turn.question for talk in TALKS for turn in talk.turns if turn.kind == OTHER}
    assert others == set(KINDS)


def test_a_picture_comes_with_its_turn_and_stays():
    for talk in TALKS:
        assert talk.turns[0].kind == FIRST and talk.turns[0].picture == 0
        for before, turn in zip(talk.turns, talk.turns[1:], strict=False):
            assert turn.kind != FIRST
            assert turn.picture - before.picture == (turn.kind == NEW_PICTURE)
        assert talk.turns[-1].picture == len(talk.scenes) - 1


def test_answers_agree_with_a_second_opinion_that_reads_words_alone():
    """`It` is what the last question with a name has named, in the picture that came last."""
    followed = Counter()
    for talk in TALKS:
        name, picture = None, 0
        for turn in talk.turns:
            scene, text = talk.scenes[turn.picture], turn.asked.text
            if turn.picture != picture:
                name, picture = None, turn.picture
            if turn.kind in (SAME, BESIDE_IT):
                assert name is not None, talk
                (thing,) = things_drawn(scene, name)
                text = text.replace("its label", "the label of it")
                text = re.sub(r"\bit\b", f"the {thing.name}", text)
                followed[turn.kind] += 1
            else:
                assert not re.search(r"\bits?\b", text)
                name = named_in(text)
            assert second_opinion(scene, text) == {turn.asked.answer}, talk
    assert min(followed[SAME], followed[BESIDE_IT]) > 100


def test_its_own_label_or_place_is_never_asked_where_an_answer_named_another_thing():
    for talk in TALKS:
        for before, turn in zip(talk.turns, talk.turns[1:], strict=False):
            if turn.kind == SAME:
                assert not re.search("left|right|above|below", before.asked.text), talk


def test_nothing_is_asked_twice_and_other_things_are_others():
    for talk in TALKS:
        for number, turn in enumerate(talk.turns):
            earlier = [t for t in talk.turns[:number] if t.picture == turn.picture]
            # The same words with another "it" are another question.
            assert turn.asked not in [each.asked for each in earlier]
            if turn.kind == OTHER:
                seen = {p for each in earlier for p in each.asked.subject + each.asked.target}
                assert not seen & {*turn.asked.subject, *turn.asked.target}


@pytest.mark.parametrize("kind", TURN_KINDS)
def test_no_answer_is_common(kind):
    """Nothing can be won by always saying the same."""
    said = Counter(t.asked.answer for talk in TALKS for t in talk.turns if t.kind == kind)
    assert max(said.values()) < (0.25 if kind == BESIDE_IT else 0.15) * sum(said.values())


def test_colours_are_single_words():
    """Names of things above are matched as two words."""
    assert all(re.fullmatch(r"\w+", colour) for colour in COLOURS)
