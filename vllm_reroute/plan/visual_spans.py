"""Where a request's visual tokens sit in its prompt."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

VISUAL_MODALITIES = ("image", "video")


@dataclass(frozen=True)
class VisualSpans:
    """Visual tokens of one request, of all its images and videos.

    starts, ends: prompt positions, half-open, ascending and disjoint.
    sizes: visual tokens of each image and video; where not given, every span is one.
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    sizes: tuple[int, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.sizes:
            lengths = (end - start for start, end in zip(self.starts, self.ends, strict=True))
            object.__setattr__(self, "sizes", tuple(lengths))

    @classmethod
    def of(cls, mm_features: Sequence[MultiModalFeatureSpec]) -> VisualSpans | None:
        """Spans of a request's multimodal features; None when it has no visual token.

        Only positions that receive an embedding count: a placeholder may hold separators too.
        """
        if not mm_features:
            return None
        return cls._of_places(
            [one.mm_position for one in mm_features if one.modality in VISUAL_MODALITIES]
        )

    @classmethod
    def of_ranges(cls, places: Mapping[str, Sequence[PlaceholderRange]]) -> VisualSpans | None:
        """The same from the places of a rendered prompt's items, by modality."""
        return cls._of_places(
            [place for name in VISUAL_MODALITIES for place in places.get(name, ())]
        )

    @classmethod
    def _of_places(cls, places: Sequence[PlaceholderRange]) -> VisualSpans | None:
        of_items = [
            [(first, last + 1) for first, last in place.extract_embeds_range()] for place in places
        ]
        spans = sorted(span for of_item in of_items for span in of_item)
        if not spans:
            return None
        return cls(
            starts=tuple(start for start, _ in spans),
            ends=tuple(end for _, end in spans),
            sizes=tuple(sum(end - start for start, end in of_item) for of_item in of_items),
        )

    @cached_property
    def num_visual(self) -> int:
        """N: the request's original number of visual tokens."""
        return sum(self.ends) - sum(self.starts)

    @property
    def first(self) -> int:
        """Prompt position of the first visual token."""
        return self.starts[0]

    @property
    def end(self) -> int:
        """One past the prompt position of the last visual token."""
        return self.ends[-1]

    def num_before(self, position: int) -> int:
        """Visual tokens at prompt positions below `position`."""
        if position >= self.end:
            return self.num_visual
        spans = bisect_right(self.starts, position)
        return sum(
            min(end, position) - start
            for start, end in zip(self.starts[:spans], self.ends[:spans], strict=True)
        )

    def mask(self, num_tokens: int) -> np.ndarray:
        """bool [num_tokens]: which of the first `num_tokens` positions are visual."""
        mask = np.zeros(num_tokens, dtype=bool)
        for start, end in zip(self.starts, self.ends, strict=True):
            mask[start:end] = True
        return mask
