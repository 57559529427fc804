"""Real photographs for demos, tests and measurements.

scikit-image ships these inside its package, so nothing is downloaded. Sources and licences are quoted from the
docstrings of `skimage.data`.
"""

import io
from dataclasses import dataclass
from functools import cached_property

import skimage.data
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Photo:
    name: str  # function of skimage.data
    source: str
    licence: str

    @cached_property
    def image(self) -> Image.Image:
        return Image.fromarray(getattr(skimage.data, self.name)()).convert("RGB")

    @cached_property
    def jpeg(self) -> bytes:
        """The photograph as a client would upload it."""
        buffer = io.BytesIO()
        self.image.save(buffer, format="JPEG", quality=90)
        return buffer.getvalue()


PHOTOS: tuple[Photo, ...] = (
    Photo(
        name="astronaut",
        source="Eileen Collins, NASA Great Images database",
        licence="public domain",
    ),
    Photo(name="chelsea", source="the cat Chelsea, by Stefan van der Walt", licence="CC0"),
    Photo(
        name="coffee",
        source="coffee cup, by Rachel Michetti for Pikolo Espresso Bar",
        licence="CC0",
    ),
    Photo(name="rocket", source="launch of a Falcon 9, by SpaceX", licence="public domain"),
)


def photo(name: str) -> Photo:
    """The photograph of that name."""
    for candidate in PHOTOS:
        if candidate.name == name:
            return candidate
    raise ValueError(
        f"There is no photograph {name!r}. Choose one of: {', '.join(each.name for each in PHOTOS)}."
    )
