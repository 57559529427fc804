"""Nüwa as a schedule: its numbers, its options, and how many tokens each image keeps."""

import json

import numpy as np
import pytest

from vllm_reroute.plan.batch_routing import BatchRouting
from vllm_reroute.plan.planning import plan_step
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.report import schedule_lines
from vllm_reroute.schedule import RerouteOptions, RoutingSchedule
from vllm_reroute.schedule.budget import num_kept, num_kept_of_images
from vllm_reroute.schedule.footprint import RequestFootprint
from vllm_reroute.schedule.published import TIERS
from vllm_reroute.schedule.routing_schedule import Decision

from .parts import feature

COUNTS = {192: (336, 48), 128: (224, 32), 64: (112, 16)}
KINDS = [{"action": "remove"}, {"variant": "A"}, {"variant": "B"}]


def nuwa(depth=32, **options) -> RoutingSchedule:
    return RerouteOptions(schedule="nuwa", **options).resolve(depth)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_tiers_are_met_exactly(tier, options):
    schedule = nuwa(tier=tier, **options)
    first, later = COUNTS[tier]
    num_later = len(schedule.layers) - 1
    assert schedule.kept_per_stage() == [first, *[later] * num_later]
    assert schedule.average() == tier
    assert schedule.kept_per_stage(576, 576)[0] == 2 * first


@pytest.mark.parametrize(
    "depth,removed,rerouted",
    [
        (32, (0, 16), (0, 16, 20, 24, 28)),
        (28, (0, 14), (0, 14, 17, 21, 24)),
        (40, (0, 20), (0, 20, 25, 30, 35)),
        (8, (0, 4), (0, 4, 5, 6, 7)),
        (5, (0, 2), (0, 2, 3, 4)),
    ],
)
def test_layers_scale_and_zero_stays(depth, removed, rerouted):
    assert nuwa(depth, action="remove").layers == removed
    if len(rerouted) == 5:
        assert nuwa(depth).layers == rerouted
        assert RerouteOptions(schedule="nuwa").resolve(depth, 3).layers == rerouted
    else:
        with pytest.raises(ValueError, match=f"do not fit a decoder of {depth} layers"):
            nuwa(depth)


def test_no_stage_is_dense():
    for options in KINDS:
        schedule = nuwa(8, **options)
        stages = schedule.stages
        assert all(stage.keep_ratio < 1 for stage in stages) and len(stages) == len(schedule.layers)
        assert schedule.encoder_ratio == stages[0].keep_ratio and schedule.boundary == 0
        assert [layer for s in stages for layer in range(s.first_layer, s.end_layer)] == list(
            range(8)
        )


def test_decisions():
    first, later = nuwa(8).keep[:2]
    removed = [
        Decision(layer=0, scored_at=None, keep_ratio=first, removes=True),
        Decision(layer=4, scored_at=3, keep_ratio=later, removes=True),
    ]
    assert list(nuwa(8, action="remove").decisions) == removed
    for variant in "AB":
        assert list(nuwa(8, variant=variant).decisions) == [
            Decision(layer=0, scored_at=None, keep_ratio=first, removes=variant == "A"),
            *(
                Decision(layer=layer, scored_at=layer, keep_ratio=later, removes=False)
                for layer in (4, 5, 6, 7)
            ),
        ]
    other = RerouteOptions(schedule="pdrop", action="remove").resolve(8)
    assert [(d.layer, d.scored_at, d.removes) for d in other.decisions] == [
        (layer, layer, True) for layer in other.layers
    ]


def test_pieces_are_cut_where_a_layer_is_scored():
    def edges(schedule):
        return [(piece.first_layer, piece.end_layer) for piece in schedule.pieces]

    assert edges(nuwa(32, action="remove")) == [(0, 15), (15, 16), (16, 32)]
    assert edges(nuwa(2, action="remove")) == [(0, 1), (1, 2)]
    for schedule in (nuwa(32), RerouteOptions(schedule="fastv").resolve(32)):
        assert schedule.pieces == schedule.stages


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("average", [1, 20, 64, 100.5, 192, 329, 400, 576])
def test_a_budget_is_met_in_nuwa_s_shape(options, average):
    schedule = nuwa(budget=average, **options)
    first, later = schedule.kept_per_stage()[:2]
    assert schedule.average() == pytest.approx(average, abs=0.25)
    assert first in (1, 576) or first / later == pytest.approx(7, rel=0.5)
    if average in TIERS:
        assert schedule.keep == nuwa(tier=int(average), **options).keep


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "nuwa", "action": "remove", "variant": "A"},
        {"schedule": "pdrop", "variant": "B"},
        {"layers": (1,), "keep": (0.5,), "variant": "A"},
        {"variant": "A"},
        {"schedule": "none", "variant": "A"},
    ],
    ids=str,
)
def test_a_variant_without_a_meaning_is_refused(options):
    with pytest.raises(ValueError) as refused:
        RerouteOptions(**options)
    for part in (
        f"--reroute-variant {options['variant']}",
        "--reroute-schedule nuwa",
        "--reroute-action reroute",
        "Leave it out",
    ):
        assert part in str(refused.value)


def test_an_unknown_variant_and_a_custom_layer_0_are_refused():
    with pytest.raises(ValueError, match="--reroute-variant 'C' is unknown"):
        RerouteOptions(schedule="nuwa", variant="C")
    with pytest.raises(ValueError, match="start at 1 or later"):
        RerouteOptions(layers=(0, 2), keep=(0.5, 0.5))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_schedule_survives_its_journey(options):
    schedule = nuwa(8, **options)
    assert RoutingSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert schedule.variant == options.get("variant")


@pytest.mark.parametrize(
    "sizes,encoder,later,expect",
    [
        ((576,), 336.5 / 576, 48.5 / 576, (336, 48)),
        ((576, 100), 336.5 / 576, 48.5 / 576, (336 + 58, 56)),
        ((3, 3, 3), 0.5, 0.4, (3, 3)),  # ranked among no more than the encoder has let through
        ((1, 1), 0.01, 0.01, (2, 2)),
        ((7, 9), 1.0, 0.5, (16, 8)),
        ((), 0.5, 0.1, (0, 0)),
    ],
)
def test_each_image_keeps_its_own_share(sizes, encoder, later, expect):
    found = tuple(num_kept_of_images(sizes, ratio, encoder) for ratio in (encoder, later))
    assert found == expect


def test_other_schedules_rank_images_jointly():
    for sizes in ((576,), (3, 3, 3), (10, 500)):
        for ratio in (0.01, 0.5, 1.0):
            assert num_kept_of_images(sizes, ratio, None) == num_kept(sum(sizes), ratio)


def test_spans_know_their_images():
    """A placeholder may have gaps: its spans are still one image."""
    mask = [1, 1, 0, 1, 1, 1]
    spans = VisualSpans.of([feature(2, 6, mask), feature(20, 4)])
    assert (spans.starts, spans.ends) == ((2, 5, 20), (4, 8, 24))
    assert spans.sizes == (5, 4)
    assert VisualSpans((2, 5), (4, 8)).sizes == (2, 3)


SPANS = VisualSpans((2, 30), (22, 37), (20, 7))  # images of 20 and 7 tokens
PROMPT = 45
TEXT = PROMPT - 27
# 10 + 3 anchors, 2 of 27 later.
TWO_DECISIONS = RoutingSchedule(
    name="nuwa", action="remove", num_layers=4, layers=(0, 2), keep=(0.5, 0.1)
)


@pytest.mark.parametrize(
    "computed,scheduled,queries,held",
    [
        (0, PROMPT, (TEXT + 13, TEXT + 2), (TEXT + 13, TEXT + 2)),
        (PROMPT, 1, (1, 1), (TEXT + 14, TEXT + 3)),
        (0, PROMPT + 6, (TEXT + 19, TEXT + 8), (TEXT + 19, TEXT + 8)),  # resumed
        (0, 2, (0, 0), (0, 0)),  # in the block of the first image: parked before layer 0
        (0, 40, (0, 0), (0, 0)),
        (40, 5, (TEXT + 13, TEXT + 2), (TEXT + 13, TEXT + 2)),
    ],
)
def test_two_images_of_different_size(computed, scheduled, queries, held):
    routing = RequestRouting.of(SPANS, range(PROMPT), TWO_DECISIONS, 16)
    step = plan_step(
        np.array([computed]),
        np.array([scheduled]),
        BatchRouting.of([routing], 2),
        dense_stages=0,
        block_size=16,
        offers_parked=False,
    )
    assert tuple(int(stage.query_lens[0]) for stage in step.stages) == queries
    assert tuple(int(stage.seq_lens[0]) for stage in step.stages) == held
    assert held == tuple(routing.kv_length(stage, computed + scheduled) for stage in (0, 1))
    decides = computed < PROMPT <= computed + scheduled
    assert [prefill.routing.kept for prefill in step.prefills] == [(13, 2)] * decides
    assert [prefill.num_tokens for prefill in step.prefills] == [computed + scheduled] * decides


def test_a_footprint_counts_image_by_image():
    schedule = nuwa(32, action="remove")
    shape = {"num_text": 10, "bytes_per_token": 1, "block_size": 1, "schedule": schedule}
    sizes = (100, 65, 11)
    kept = sum(num_kept(size, schedule.encoder_ratio) for size in sizes)
    later = num_kept(sum(sizes), schedule.keep[1])
    several = RequestFootprint(num_visual=sum(sizes), image_sizes=sizes, **shape)
    assert several.routed_blocks == 16 * (10 + kept) + 16 * (10 + later) == several.ideal_bytes
    one = RequestFootprint(num_visual=576, **shape)
    assert one.kept == [336, 48]


@pytest.mark.parametrize(
    "options,shown",
    [
        ({"action": "remove"}, "action remove (deferred tokens are gone for good)"),
        ({"variant": "A"}, "action reroute, variant A (deferred tokens may come back)"),
        ({"variant": "B"}, "action reroute, variant B (deferred tokens may come back)"),
    ],
)
def test_the_report_says_who_decides(options, shown):
    lines = schedule_lines(nuwa(**options), 576)
    fate = "may come back" if options.get("variant") == "B" else "are gone for good"
    assert shown in lines[0]
    assert any("vision encoder decides" in line and line.endswith(fate) for line in lines)
    assert any("192.0 per layer on average, of 576" in line for line in lines)
    other = "\n".join(schedule_lines(RerouteOptions(schedule="pdrop").resolve(32), 576))
    assert "vision encoder" not in other
