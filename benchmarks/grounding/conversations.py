"""Conversations of two to four turns about a scene, each turn with exactly one right answer whatever was said before.

"It" is the one thing that the last question with a name for a thing has named: "Where is the red circle?", "What is
below it?". A question that names none, several, or one thing by another is never followed by "it". A picture may come
with any turn after the first; from there on questions are about that one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.grounding.questions import (
    KINDS,
    NOTHING,
    SPLITS,
    Asked,
    Place,
    ask,
    maybe_empty,
    next_places,
)
from benchmarks.grounding.scenes import Scene, Thing, sample_scene

FIRST, SAME, OTHER, BESIDE_IT, NEW_PICTURE = "first", "same", "other", "beside it", "new picture"
# How a turn follows what was said: it opens the conversation, asks something else about "it", asks about another thing
# of the picture, asks what is next to "it", or comes with a picture of its own.
TURN_KINDS = (FIRST, SAME, OTHER, BESIDE_IT, NEW_PICTURE)
LENGTHS = (2, 3, 4)
# One of so many conversations has a second picture.
PICTURE_EVERY = 4
# Kinds of question that name one thing -> what they say or ask of it beside its name. None: "its label" might be
# understood as that of the thing in the answer, so what is next to "it" is all that follows.
NAMING: dict[str, frozenset[str] | None] = {
    "where": frozenset({"place"}),
    "largest": frozenset({"place"}),
    "at": frozenset({"place"}),
    "label": frozenset({"label"}),
    "labelled": frozenset({"label"}),
    "beside": None,
}
TRIES = 20


@dataclass(frozen=True, kw_only=True)
class Turn:
    """kind: of TURN_KINDS. question: its kind in KINDS, or that of the turn for a question about "it".

    picture: which of the conversation's scenes it is about; a scene's picture comes with its first turn.
    """

    kind: str
    question: str
    asked: Asked
    picture: int


@dataclass(frozen=True, kw_only=True)
class Conversation:
    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Topic:
    """What "it" means now: nothing if there is no thing.

    known: what of it was said or asked for, None where its label and place may not be asked for. sides: directions
    that were asked about. seen, texts: places that questions about this picture were about, and their words.
    """

    thing: Thing | None = None
    known: frozenset[str] | None = None
    sides: frozenset[str] = frozenset()
    seen: frozenset[Place] = frozenset()
    texts: frozenset[str] = frozenset()


def conversations(split: str, count: int) -> Iterator[Conversation]:
    """`count` conversations of a split, lengths in turn, each about scenes of its own."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown. Choose one of: {', '.join(SPLITS)}.")
    seeds = iter(SPLITS[split])
    for number in range(count):
        new_picture = number % PICTURE_EVERY == PICTURE_EVERY - 1
        length = LENGTHS[number // PICTURE_EVERY % len(LENGTHS)]
        kind = list(KINDS)[number % len(KINDS)]
        while True:
            scenes = [sample_scene(next(seeds)) for _ in range(1 + new_picture)]
            rng = np.random.default_rng([scenes[0].seed, 4])
            if (found := converse(scenes, length, rng, kind)) is not None:
                break
        yield found


def converse(
    scenes: list[Scene], length: int, rng: np.random.Generator, first: str | None = None
) -> Conversation | None:
    """A random conversation of that many turns; None if the scenes allow none that was tried.

    scenes: one, or two of which the second's picture comes with a later turn. first: kind of the first question.
    """
    second_from = int(rng.integers(1, length)) if len(scenes) == 2 else length
    turns: list[Turn] = []
    topic = Topic()
    for number in range(length):
        picture = int(number >= second_from)
        scene = scenes[picture]
        if number in (0, second_from):
            kind, topic = (NEW_PICTURE if number else FIRST), Topic()
        else:
            # Where nothing is "it", or all of it was asked, another thing is asked about.
            follows = {SAME: _same(topic), BESIDE_IT: any(s[-1] for s in _sides(scene, topic))}
            options = [OTHER, *2 * [follow for follow, can in follows.items() if can]]
            kind = options[int(rng.integers(len(options)))]
        found = _turn(scene, kind, topic, rng, first if number == 0 else None)
        if found is None:
            return None
        question, asked = found
        turns.append(Turn(kind=kind, question=question, asked=asked, picture=picture))
        topic = _next_topic(scene, kind, question, asked, topic)
    return Conversation(scenes=tuple(scenes), turns=tuple(turns))


def _turn(
    scene: Scene, kind: str, topic: Topic, rng: np.random.Generator, question: str | None
) -> tuple[str, Asked] | None:
    """The kind of question and the question; None if none was found."""
    if kind == SAME:
        options = _same(topic)
        return kind, options[int(rng.integers(len(options)))]
    if kind == BESIDE_IT:
        return kind, _beside_it(scene, topic, rng)
    for _ in range(TRIES):
        wanted = question or list(KINDS)[int(rng.integers(len(KINDS)))]
        asked = ask(scene, wanted, rng)
        if asked is None or asked.text in topic.texts:
            continue
        if not topic.seen & {*asked.subject, *asked.target}:
            return wanted, asked
    return None


def _same(topic: Topic) -> list[Asked]:
    """What is left to ask about the thing itself."""
    thing = topic.thing
    if thing is None or topic.known is None:
        return []
    place = ((thing.row, thing.column),)
    options = {
        "place": Asked("Where is it?", thing.cell, place, place),
        "label": Asked("What is its label?", thing.label, place, place),
    }
    return [asked for what, asked in options.items() if what not in topic.known]


def _sides(scene: Scene, topic: Topic) -> list[tuple[str, Place, Thing | None]]:
    """(direction, place next to "it" that way, what is there) for those that were not asked about."""
    if topic.thing is None:
        return []
    places = next_places(topic.thing.row, topic.thing.column)
    return [(side, at, scene.thing_at(*at)) for side, at in places if side not in topic.sides]


def _beside_it(scene: Scene, topic: Topic, rng: np.random.Generator) -> Asked:
    side, place, other = maybe_empty(_sides(scene, topic), rng)
    assert topic.thing is not None
    return Asked(
        f"What is {side} it?",
        other.name if other else NOTHING,
        ((topic.thing.row, topic.thing.column),),
        (place,),
    )


def _next_topic(scene: Scene, kind: str, question: str, asked: Asked, topic: Topic) -> Topic:
    """What "it" means after that question."""
    topic = replace(
        topic,
        seen=topic.seen | {*asked.subject, *asked.target},
        texts=topic.texts | {asked.text},
    )
    if kind == SAME:
        return replace(topic, known=frozenset({"place", "label"}))
    if kind == BESIDE_IT:
        side = asked.text.removeprefix("What is ").removesuffix(" it?")
        return replace(topic, known=None, sides=topic.sides | {side})
    if question not in NAMING:
        return replace(topic, thing=None, known=None, sides=frozenset())
    side = asked.text.partition("What is ")[2].partition(" the ")[0]
    return replace(
        topic,
        thing=scene.thing_at(*asked.subject[0]),
        known=NAMING[question],
        sides=frozenset({side} if question == "beside" else ()),
    )
