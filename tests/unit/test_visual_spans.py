"""Which prompt positions are visual tokens, and how many of them lie before a position."""

import random

import numpy as np
import pytest

from vllm_reroute.plan.visual_spans import VisualSpans

from .parts import feature

TWO_IMAGES = VisualSpans((3, 10), (7, 12))


@pytest.mark.parametrize(
    "features,spans",
    [
        ([], None),
        ([feature(0, 4)], [(0, 4)]),
        ([feature(5, 4)], [(5, 9)]),
        ([feature(3, 4), feature(10, 2)], [(3, 7), (10, 12)]),
        ([feature(10, 2), feature(3, 4)], [(3, 7), (10, 12)]),
        ([feature(3, 4), feature(7, 4)], [(3, 7), (7, 11)]),
        ([feature(2, 5, is_embed=[0, 1, 0, 1, 1])], [(3, 4), (5, 7)]),
        ([feature(2, 3, is_embed=[0, 0, 0])], None),
        ([feature(2, 4, modality="video")], [(2, 6)]),
        ([feature(2, 4, modality="audio")], None),
        ([feature(2, 4, modality="audio"), feature(8, 4)], [(8, 12)]),
    ],
)
def test_spans_of_a_request(features, spans):
    found = VisualSpans.of(features)
    assert (found and list(zip(found.starts, found.ends, strict=True))) == spans


@pytest.mark.parametrize(
    "position,before",
    [(0, 0), (3, 0), (4, 1), (6, 3), (7, 4), (9, 4), (10, 4), (11, 5), (12, 6), (13, 6), (100, 6)],
)
def test_visual_tokens_before_a_position(position, before):
    assert TWO_IMAGES.num_before(position) == before


def test_first_end_and_count():
    assert (TWO_IMAGES.first, TWO_IMAGES.end, TWO_IMAGES.num_visual) == (3, 12, 6)


def test_counts_and_mask_are_those_of_the_placeholders():
    rng = random.Random(0)
    for _ in range(50):
        features, position, expect = [], 0, []
        for _ in range(rng.randint(1, 4)):
            text, length = rng.randint(0, 5), rng.randint(1, 9)
            embeds = (
                [1, *(rng.randint(0, 1) for _ in range(length - 1))] if rng.random() < 0.5 else None
            )
            features.append(feature(position + text, length, is_embed=embeds))
            expect += [0] * text + (embeds or [1] * length)
            position += text + length
        expect += [0] * 5
        spans = VisualSpans.of(features)
        assert spans.mask(len(expect)).tolist() == [bool(e) for e in expect]
        assert [spans.num_before(p) for p in range(len(expect) + 1)] == [0, *np.cumsum(expect)]
        assert spans.num_visual == sum(expect)


def test_a_mask_may_end_inside_an_image():
    assert TWO_IMAGES.mask(5).tolist() == [False, False, False, True, True]
