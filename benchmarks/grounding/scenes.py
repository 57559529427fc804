"""Scenes: coloured, labelled shapes on a 4×4 grid of places, and how they are drawn.

Everything follows from a scene's seed. A thing lies wholly inside its place; where in it and how large varies.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.photos import PHOTOS

GRID = 4
PLACE_SIZE = 42
IMAGE_SIZE = GRID * PLACE_SIZE
FEWEST_THINGS, MOST_THINGS = 5, 9

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (255, 145, 20),
    "yellow": (250, 225, 50),
    "green": (35, 155, 60),
    "blue": (40, 85, 220),
    "purple": (145, 50, 185),
    "white": (240, 240, 240),
    "black": (30, 30, 30),
}
LIGHT_COLOURS = frozenset({"orange", "yellow", "white"})
COLOUR_JITTER = 10
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
# None that could be read as another where it is small.
LABELS = tuple("24578" + "ACEHKLPTUXY")
# Radii in pixels, in bands with gaps between them: a thing of a larger band is clearly larger.
RADII = ((12.0, 13.0), (15.0, 16.0), (18.5, 19.5))


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One labelled shape."""

    row: int  # from the top
    column: int  # from the left
    colour: str
    shape: str
    label: str
    radius: float  # pixels
    centre: tuple[float, float]  # x, y in pixels; the label stands here

    @property
    def cell(self) -> str:
        return cell_name(self.row, self.column)

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Things in reading order. No two share a place, a label, or both colour and shape."""

    seed: int
    things: tuple[Thing, ...]

    def thing_at(self, row: int, column: int) -> Thing | None:
        return next((t for t in self.things if (t.row, t.column) == (row, column)), None)


def cell_name(row: int, column: int) -> str:
    """Rows a to d from the top, columns 1 to 4 from the left."""
    return "abcd"[row] + str(column + 1)


def sample_scene(seed: int) -> Scene:
    """The scene of that seed."""
    rng = np.random.default_rng([seed, 0])
    count = int(rng.integers(FEWEST_THINGS, MOST_THINGS + 1))
    places = np.sort(rng.permutation(GRID * GRID)[:count])
    looks = rng.permutation(len(COLOURS) * len(SHAPES))[:count]
    labels = rng.permutation(len(LABELS))[:count]
    things = []
    for place, look, label in zip(places.tolist(), looks.tolist(), labels.tolist(), strict=True):
        row, column = divmod(place, GRID)
        radius = float(rng.uniform(*RADII[rng.integers(len(RADII))]))
        slack = PLACE_SIZE / 2 - radius - 1
        x, y = (np.array([column, row]) + 0.5) * PLACE_SIZE + rng.uniform(-slack, slack, 2)
        things.append(
            Thing(
                row=row,
                column=column,
                colour=list(COLOURS)[look % len(COLOURS)],
                shape=SHAPES[look // len(COLOURS)],
                label=LABELS[label],
                radius=radius,
                centre=(float(x), float(y)),
            )
        )
    return Scene(seed=seed, things=tuple(things))


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of IMAGE_SIZE × IMAGE_SIZE pixels."""
    rng = np.random.default_rng([scene.seed, 1])
    image = _background(rng)
    draw = ImageDraw.Draw(image)
    _clutter(draw, rng)
    for thing in scene.things:
        _draw_thing(draw, thing, rng)
    return image


def _background(rng: np.random.Generator) -> Image.Image:
    """A crop of a photograph, clouds of colour, or stripes."""
    kind = rng.integers(4)
    if kind < 2:
        photo = _photo(int(rng.integers(len(PHOTOS))))
        side = int(rng.integers(IMAGE_SIZE, min(photo.size) + 1))
        left = int(rng.integers(photo.width - side + 1))
        top = int(rng.integers(photo.height - side + 1))
        box = (left, top, left + side, top + side)
        return photo.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR, box, 2.0)
    if kind == 2:
        cells = int(rng.choice([3, 7, 21]))
        clouds = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        return Image.fromarray(clouds).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    colours = rng.integers(0, 256, (2, 3))
    angle, period = rng.uniform(0, math.pi), rng.uniform(6, 160)
    along = np.arange(IMAGE_SIZE, dtype=np.float32)
    wave = np.sin(
        (math.cos(angle) * along + math.sin(angle) * along[:, None]) * (2 * math.pi / period)
    )
    weight = (0.5 + 0.5 * wave)[..., None]
    return Image.fromarray((weight * colours[0] + (1 - weight) * colours[1]).astype(np.uint8))


@cache
def _photo(index: int) -> Image.Image:
    return PHOTOS[index].image


def _clutter(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Thin lines and specks, some in the colours of things, all too small to be one."""
    palette = list(COLOURS.values())
    for _ in range(rng.integers(4, 16)):
        colour = palette[rng.integers(len(palette))]
        x, y = rng.uniform(0, IMAGE_SIZE, 2)
        if rng.random() < 0.5:
            dx, dy = rng.uniform(-18, 18, 2)
            draw.line((x, y, x + dx, y + dy), colour, 1)
        else:
            size = rng.uniform(0.5, 2.5)
            draw.ellipse((x - size, y - size, x + size, y + size), colour)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, rng: np.random.Generator) -> None:
    """The shape with an outline, its label on it in the outline's colour."""
    jitter = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3)
    fill = tuple(int(v) for v in np.clip(np.array(COLOURS[thing.colour]) + jitter, 0, 255))
    ink = (0, 0, 0) if thing.colour in LIGHT_COLOURS else (255, 255, 255)
    x, y = thing.centre
    if thing.shape == "circle":
        r = thing.radius
        draw.ellipse((x - r, y - r, x + r, y + r), fill, ink, 1)
    else:
        tilt = math.radians(rng.uniform(-8, 8))
        draw.polygon(_corners(thing.shape, x, y, thing.radius, tilt), fill, ink, 1)
    draw.text(
        (x, y), thing.label, ink, _font(round(3 + 1.05 * thing.radius)), anchor="mm",
        stroke_width=1, stroke_fill=fill,
    )  # fmt: skip


# Corners as (angle in degrees clockwise from the top, share of the radius).
_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": tuple((45 + 90 * i, 1.0) for i in range(4)),
    "triangle": tuple((120 * i, 1.0) for i in range(3)),
    "diamond": ((0, 1.0), (90, 0.75), (180, 1.0), (270, 0.75)),
    "star": tuple((36 * i, 0.5 if i % 2 else 1.0) for i in range(10)),
    "cross": tuple(
        (90 * i + a, s) for i in range(4) for a, s in ((-22.0, 1.0), (22.0, 1.0), (45.0, 0.53))
    ),
}


def _corners(shape: str, x: float, y: float, radius: float, tilt: float) -> list:
    """Pixel coordinates of a shape's corners, none further than `radius` from the centre."""
    return [
        (
            x + radius * share * math.sin(math.radians(angle) + tilt),
            y - radius * share * math.cos(math.radians(angle) + tilt),
        )
        for angle, share in _OUTLINES[shape]
    ]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The typeface inside Pillow, so that pictures do not depend on installed fonts."""
    return ImageFont.load_default(size)
