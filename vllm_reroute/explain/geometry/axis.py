"""From the pixels a model sees back to those of the picture, an axis at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Width or height of a picture, and where a processor puts it on its canvas.

    size: pixels of the picture. length: pixels of the canvas. Pixel p of the picture lies at
    p * scale + offset of the canvas.
    """

    size: int
    length: float
    scale: float = 1.0
    offset: float = 0.0

    @classmethod
    def of(cls, size: int) -> Axis:
        """The picture as it is."""
        return cls(size=size, length=size)

    def resized(self, length: int) -> Axis:
        """The whole canvas stretched to `length`."""
        by = length / self.length
        return Axis(
            size=self.size, length=length, scale=self.scale * by, offset=self.offset * by
        )  # fmt: skip

    def framed(self, before: int, length: int) -> Axis:
        """A canvas of `length`, with `before` more pixels in front (fewer, if negative)."""
        return Axis(
            size=self.size, length=length, scale=self.scale, offset=self.offset + before
        )  # fmt: skip

    def in_picture(self, intervals: np.ndarray) -> np.ndarray:
        """Intervals [n, 2] of the canvas as those of the picture, cut off at its edges.

        NaN for those that lie outside.
        """
        inside = np.clip((intervals - self.offset) / self.scale, 0, self.size)
        inside[inside[:, 1] <= inside[:, 0]] = np.nan
        return inside


def in_row(num: int, length: float) -> np.ndarray:
    """[num, 2]: intervals of that length, side by side from 0 on."""
    starts = np.arange(num) * float(length)
    return np.stack((starts, starts + length), axis=1)
