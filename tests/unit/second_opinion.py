"""Answers to questions about a scene, read from their words and from where things were drawn."""

import re

from benchmarks.grounding.scenes import COLOURS, SHAPES, Scene, Thing


def second_opinion(scene: Scene, text: str) -> set[str]:
    """All answers to a question, read from its words and from where things were drawn."""
    if found := re.fullmatch(r"Where is the (.+)\?", text):
        return {cell_drawn(thing) for thing in meant(scene, found[1])}
    if found := re.fullmatch(r"What is at (\w\d)\?", text):
        here = [t for t in scene.things if cell_drawn(t) == found[1]]
        return {f"{t.colour} {t.shape}" for t in here} or {"nothing"}
    if found := re.fullmatch(r"What has the label (\w)\?", text):
        return {f"{t.colour} {t.shape}" for t in scene.things if t.label == found[1]}
    if found := re.fullmatch(r"Where are the (?:(\w+) things|(\w+)s), and how many\?", text):
        shape = "cross" if found[2] == "crosse" else found[2]
        assert found[1] in COLOURS or shape in SHAPES
        cells = sorted(
            cell_drawn(t) for t in scene.things if found[1] == t.colour or shape == t.shape
        )
        return {f"{' '.join(cells) or 'nowhere'}: {len(cells)}"}
    if found := re.fullmatch(r"What is the label of the (.+)\?", text):
        return {thing.label for thing in meant(scene, found[1])}
    if found := re.fullmatch(r"What is (left of|right of|above|below) (\w\d)\?", text):
        there = [t for t in scene.things if direction_of(found[2], cell_drawn(t)) == found[1]]
        return {f"{t.colour} {t.shape}" for t in there} or {"nothing"}
    found = re.fullmatch(r"What is ((?:left of|right of|above|below) the .+)\?", text)
    return {f"{t.colour} {t.shape}" for t in meant(scene, f"thing {found[1]}")} or {"nothing"}


def meant(scene: Scene, words: str) -> list[Thing]:
    """The things a phrase could mean."""
    if found := re.fullmatch(r"thing (left of|right of|above|below) the (.+)", words):
        return [
            other
            for thing in meant(scene, found[2])
            for other in scene.things
            if direction_drawn(thing, other) == found[1]
        ]
    adjective, shape = words.split()
    alike = [thing for thing in scene.things if thing.shape == shape]
    if adjective in ("largest", "smallest"):
        end = max if adjective == "largest" else min
        radius = end(thing.radius for thing in alike)
        close = [t for t in alike if max(t.radius, radius) < 1.15 * min(t.radius, radius)]
        assert len(alike) > 1
        return close
    return [thing for thing in alike if thing.colour == adjective]


def cell_drawn(thing: Thing) -> str:
    return "abcd"[int(thing.centre[1] // 42)] + "1234"[int(thing.centre[0] // 42)]


def direction_drawn(thing: Thing, other: Thing) -> str | None:
    """Where the place of `other` lies, if next to that of `thing`."""
    return direction_of(cell_drawn(thing), cell_drawn(other))


def direction_of(a: str, b: str) -> str | None:
    """Where cell b lies, if next to cell a."""
    down, right = ord(b[0]) - ord(a[0]), int(b[1]) - int(a[1])
    return {(0, -1): "left of", (0, 1): "right of", (-1, 0): "above", (1, 0): "below"}.get(
        (down, right)
    )
