"""Where a request's visual tokens sit in its prompt."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.request import Request

VISUAL_MODALITIES = ("image", "video")


@dataclass(frozen=True)
class VisualSpans:
    """Visual tokens of one request, of all its images and videos.

    starts, ends: prompt positions, half-open, ascending and disjoint.
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, mm_features: Sequence[MultiModalFeatureSpec]) -> VisualSpans | None:
        """Spans of a request's multimodal features; None when it has no visual token.

        Only positions that receive an embedding count: a placeholder may hold separators too.
        """
        if not mm_features:
            return None
        spans = sorted(
            (first, last + 1)
            for feature in mm_features
            if feature.modality in VISUAL_MODALITIES
            for first, last in feature.mm_position.extract_embeds_range()
        )
        if not spans:
            return None
        return cls(tuple(start for start, _ in spans), tuple(end for _, end in spans))

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


_SPANS_OF_REQUEST: WeakKeyDictionary[Request, VisualSpans | None] = WeakKeyDictionary()


def visual_spans(request: Request) -> VisualSpans | None:
    """Spans of a live request, computed once; they go when the request goes."""
    if not request.mm_features:
        return None
    if request not in _SPANS_OF_REQUEST:
        _SPANS_OF_REQUEST[request] = VisualSpans.of(request.mm_features)
    return _SPANS_OF_REQUEST[request]
