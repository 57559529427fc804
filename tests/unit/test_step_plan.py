"""Step tables: how many tokens every stage runs and holds, whatever the batch is made of."""

import random

import numpy as np
import pytest

from vllm_reroute.plan.routed_length import routed_length
from vllm_reroute.plan.step_plan import ImagePrefill, RequestRouting, plan_step
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.schedule import RerouteOptions
from vllm_reroute.schedule.budget import num_kept

RATIOS = (1.0, 0.5, 0.1)  # an image of 20 tokens keeps 20, 10 and 2
PROMPT = 30
IMAGE = VisualSpans((4,), (24,))
TWO_IMAGES = VisualSpans((2, 14), (10, 26))  # 8 + 12 tokens, ranked jointly
LAST = VisualSpans((9,), (29,))  # a single text token behind the image
NO_TEXT_BEFORE = VisualSpans((0,), (20,))


def plan(*batch):
    """batch: (spans or None, computed, scheduled) per request, all with prompts of 30 tokens."""
    spans, computed, scheduled = zip(*batch, strict=True)
    routings = [RequestRouting.of(s, range(PROMPT), RATIOS) for s in spans]
    return plan_step(np.array(computed), np.array(scheduled), routings, RATIOS)


def lengths(step):
    """[[query_len, seq_len] per ratio] per request."""
    per_ratio = [step.lengths[ratio] for ratio in RATIOS]
    return [
        [[int(of.query_lens[i]), int(of.seq_lens[i])] for of in per_ratio]
        for i in range(step.num_reqs)
    ]


@pytest.mark.parametrize(
    "what,request_,expect",
    [
        ("text prompt, whole", (None, 0, 30), [[30, 30], [30, 30], [30, 30]]),
        ("text chunk", (None, 16, 8), [[8, 24], [8, 24], [8, 24]]),
        ("text decode", (None, 40, 1), [[1, 41], [1, 41], [1, 41]]),
        ("image prompt, whole", (IMAGE, 0, 30), [[30, 30], [20, 20], [12, 12]]),
        ("image at the start", (NO_TEXT_BEFORE, 0, 30), [[30, 30], [20, 20], [12, 12]]),
        ("image at the end", (LAST, 0, 30), [[30, 30], [20, 20], [12, 12]]),
        ("the text before an image, alone", (IMAGE, 0, 4), [[4, 4], [4, 4], [4, 4]]),
        ("several images", (TWO_IMAGES, 0, 30), [[30, 30], [20, 20], [12, 12]]),
        ("first decode behind an image", (IMAGE, 30, 1), [[1, 31], [1, 21], [1, 13]]),
        ("later decode behind an image", (IMAGE, 47, 1), [[1, 48], [1, 38], [1, 30]]),
        ("resumed: prompt and 5 generated", (IMAGE, 0, 35), [[35, 35], [25, 25], [17, 17]]),
        (
            "resumed: the prompt, the rest does not fit",
            (IMAGE, 0, 31),
            [[31, 31], [21, 21], [13, 13]],
        ),
        ("resumed: 4 generated in a later chunk", (IMAGE, 31, 4), [[4, 35], [4, 25], [4, 17]]),
        (
            "resumed: generated behind several images",
            (TWO_IMAGES, 30, 5),
            [[5, 35], [5, 25], [5, 17]],
        ),
    ],
)
def test_stage_lengths(what, request_, expect):
    assert lengths(plan(request_)) == [expect]


def test_a_mixed_batch():
    step = plan(
        (None, 16, 8),
        (IMAGE, 40, 1),
        (IMAGE, 0, 30),
        (None, 3, 1),
        (TWO_IMAGES, 0, 33),
        (None, 0, 7),
    )
    assert (step.num_reqs, step.num_tokens) == (6, 80)
    assert [step.lengths[r].query_lens.tolist() for r in RATIOS] == [
        [8, 1, 30, 1, 33, 7],
        [8, 1, 20, 1, 23, 7],
        [8, 1, 12, 1, 15, 7],
    ]
    assert [step.lengths[r].seq_lens.tolist() for r in RATIOS] == [
        [24, 41, 30, 4, 33, 7],
        [24, 31, 20, 4, 23, 7],
        [24, 23, 12, 4, 15, 7],
    ]
    assert [step.lengths[r].query_start_loc.tolist() for r in RATIOS] == [
        [0, 8, 9, 39, 40, 73, 80],
        [0, 8, 9, 29, 30, 53, 60],
        [0, 8, 9, 21, 22, 37, 44],
    ]
    assert [step.lengths[r].num_tokens for r in RATIOS] == [80, 60, 44]
    assert [(p.index, p.start, p.num_tokens) for p in step.prefills] == [(2, 9, 30), (4, 40, 33)]
    assert [[p.routing.num_kept(i) for i in range(3)] for p in step.prefills] == [[20, 10, 2]] * 2


@pytest.mark.parametrize(
    "batch",
    [
        [(None, 0, 30)],
        [(None, 0, 30), (IMAGE, 30, 1), (TWO_IMAGES, 99, 1)],
        [(IMAGE, 30, 5)],
    ],
)
def test_nothing_to_route_without_an_image_prompt(batch):
    assert plan(*batch).prefills == ()


def test_a_prefill_knows_its_request():
    (prefill,) = plan((IMAGE, 0, 32)).prefills
    assert isinstance(prefill, ImagePrefill)
    assert (prefill.routing.num_prompt, prefill.routing.spans) == (PROMPT, IMAGE)
    assert prefill.routing.deferred.tolist() == [0, 10, 18]


def test_lengths_are_what_attention_kernels_take():
    step = plan((IMAGE, 0, 30), (None, 3, 1))
    for of_ratio in step.lengths.values():
        for array in (of_ratio.query_lens, of_ratio.seq_lens, of_ratio.query_start_loc):
            assert array.dtype == np.int32


@pytest.mark.parametrize(
    "what,request_",
    [
        ("cut inside the image", (IMAGE, 0, 12)),
        ("cut before the scoring token", (IMAGE, 0, 29)),
        ("first part missing", (IMAGE, 2, 28)),
        ("image computed in halves", (IMAGE, 12, 18)),
        ("cut between two images", (TWO_IMAGES, 0, 12)),
        ("second image alone", (TWO_IMAGES, 12, 18)),
    ],
)
def test_a_cut_image_prompt_is_our_own_bug(what, request_):
    with pytest.raises(AssertionError, match="not scheduled whole"):
        plan(request_)


def random_request(rng):
    """Spans, prompt length, tokens before, tokens now: any state a scheduler may leave it in."""
    num_prompt = rng.randint(1, 120)
    if num_prompt < 8 or rng.random() < 0.4:
        computed = rng.randint(0, num_prompt + 40)
        return None, num_prompt, computed, rng.randint(1, 40)
    cuts = sorted(rng.sample(range(num_prompt - 1), 2 * rng.randint(1, 3)))
    spans = VisualSpans(tuple(cuts[::2]), tuple(cuts[1::2]))
    if rng.random() < 0.5:
        return spans, num_prompt, 0, num_prompt + rng.choice((0, 0, 3, 25))
    return spans, num_prompt, num_prompt + rng.randint(0, 40), rng.randint(1, 5)


@pytest.mark.parametrize("seed", range(20))
def test_scheduler_and_worker_always_agree(seed):
    """What the scheduler allocates for equals what the worker reads and writes, for every ratio."""
    rng = random.Random(seed)
    schedules = (
        RerouteOptions(schedule="pdrop", tier=64).resolve(32),
        RerouteOptions(layers=(1, 3, 4), keep=(rng.random(), 1.0, rng.random())).resolve(6),
    )
    for schedule in schedules:
        ratios = schedule.ratios
        batch = [random_request(rng) for _ in range(rng.randint(1, 12))]
        computed, scheduled = (np.array([r[i] for r in batch]) for i in (2, 3))
        routings = [
            RequestRouting.of(spans, range(num_prompt), ratios) for spans, num_prompt, *_ in batch
        ]
        step = plan_step(computed, scheduled, routings, ratios)
        for g, ratio in enumerate(ratios):
            of_ratio = step.lengths[ratio]
            for i, (spans, _, before, now) in enumerate(batch):
                held_before = routed_length(before, spans, ratio)
                assert of_ratio.seq_lens[i] == routed_length(before + now, spans, ratio)
                assert of_ratio.query_lens[i] == of_ratio.seq_lens[i] - held_before
                if spans is not None:
                    assert routings[i].num_kept(g) == num_kept(spans.num_visual, ratio)
        assert len(step.prefills) == sum(s is not None and before == 0 for s, _, before, _ in batch)


@pytest.mark.parametrize(
    "num_tokens,lengths_",
    [
        (3, [3, 3, 3]),
        (4, [4, 4, 4]),
        (5, [5, 5, 5]),
        (9, [9, 9, 6]),
        (24, [24, 14, 6]),
        (30, [30, 20, 12]),
    ],
)
def test_routed_length_inside_a_prompt(num_tokens, lengths_):
    """Text always counts, visual tokens until their share is full."""
    assert [routed_length(num_tokens, IMAGE, ratio) for ratio in RATIOS] == lengths_
    assert [routed_length(num_tokens, None, ratio) for ratio in RATIOS] == [num_tokens] * 3
