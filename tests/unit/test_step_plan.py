"""Step tables: what every stage runs and holds, and what waits in pages, whatever the batch is."""

import random

import numpy as np
import pytest

from vllm_reroute.plan.batch_routing import BatchRouting
from vllm_reroute.plan.planning import plan_step
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.step_plan import ImagePrefill, StageLengths
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.schedule import RerouteOptions, RoutingSchedule

from .slow_steps import BLOCK, SCHEDULES, random_request, random_scheduled

# Three stages; of an image of 20 tokens they run 20, 10 and 2.
SCHEDULE = RerouteOptions(layers=(1, 2), keep=(0.5, 0.1)).resolve(3)
PROMPT = 30
IMAGE = VisualSpans((9,), (29,))  # behind two blocks of text, before a single text token
TWO_IMAGES = VisualSpans((2, 14), (10, 26))  # 8 + 12 tokens, ranked jointly
NO_TEXT_BEFORE = VisualSpans((0,), (20,))


def plan_of(routings, computed, scheduled, *, dense_stages=1, offers_parked=True, num_stages=3):
    return plan_step(
        np.array(computed, dtype=np.int64),
        np.array(scheduled, dtype=np.int64),
        BatchRouting.of(routings, num_stages),
        dense_stages=dense_stages,
        block_size=BLOCK,
        offers_parked=offers_parked,
    )


def plan(*batch, offers_parked=True):
    """batch: (spans or None, computed, scheduled) per request, all with prompts of 30 tokens."""
    spans, computed, scheduled = zip(*batch, strict=True)
    routings = [RequestRouting.of(s, range(PROMPT), SCHEDULE, BLOCK) for s in spans]
    return plan_of(routings, computed, scheduled, offers_parked=offers_parked)


def lengths(step):
    """[[query_len, seq_len] per stage] per request."""
    return [
        [[int(stage.query_lens[i]), int(stage.seq_lens[i])] for stage in step.stages]
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
        ("several images", (TWO_IMAGES, 0, 30), [[30, 30], [20, 20], [12, 12]]),
        ("blocks of text before an image", (IMAGE, 0, 6), [[6, 6], [6, 6], [6, 6]]),
        ("up to the image's block", (IMAGE, 6, 2), [[2, 8], [2, 8], [2, 8]]),
        ("text in the image's block", (IMAGE, 8, 1), [[1, 9], [0, 8], [0, 8]]),
        ("into the image", (IMAGE, 6, 9), [[9, 15], [2, 8], [2, 8]]),
        ("inside the image", (IMAGE, 15, 5), [[5, 20], [0, 8], [0, 8]]),
        ("all but the last token", (IMAGE, 20, 9), [[9, 29], [0, 8], [0, 8]]),
        ("the last token", (IMAGE, 29, 1), [[1, 30], [12, 20], [4, 12]]),
        ("last chunk", (IMAGE, 20, 10), [[10, 30], [12, 20], [4, 12]]),
        ("last chunk, no text before", (NO_TEXT_BEFORE, 4, 26), [[26, 30], [20, 20], [12, 12]]),
        ("chunk of an image at the start", (NO_TEXT_BEFORE, 0, 25), [[25, 25], [0, 0], [0, 0]]),
        ("between two images", (TWO_IMAGES, 10, 4), [[4, 14], [0, 0], [0, 0]]),
        ("first decode behind an image", (IMAGE, 30, 1), [[1, 31], [1, 21], [1, 13]]),
        ("later decode behind an image", (IMAGE, 47, 1), [[1, 48], [1, 38], [1, 30]]),
        ("resumed: prompt and 5 generated", (IMAGE, 0, 35), [[35, 35], [25, 25], [17, 17]]),
        ("resumed, from the cache", (IMAGE, 28, 7), [[7, 35], [17, 25], [9, 17]]),
        ("resumed: 4 generated in a later chunk", (IMAGE, 31, 4), [[4, 35], [4, 25], [4, 17]]),
    ],
)
def test_stage_lengths(what, request_, expect):
    assert lengths(plan(request_)) == [expect]


def test_a_mixed_batch():
    step = plan(
        (None, 16, 8),
        (IMAGE, 40, 1),
        (IMAGE, 12, 18),
        (None, 3, 1),
        (TWO_IMAGES, 0, 33),
        (TWO_IMAGES, 4, 6),
    )
    assert (step.num_reqs, step.num_tokens) == (6, 67)
    assert [stage.query_lens.tolist() for stage in step.stages] == [
        [8, 1, 18, 1, 33, 6],
        [8, 1, 12, 1, 23, 0],
        [8, 1, 4, 1, 15, 0],
    ]
    assert [stage.seq_lens.tolist() for stage in step.stages] == [
        [24, 41, 30, 4, 33, 10],
        [24, 31, 20, 4, 23, 0],
        [24, 23, 12, 4, 15, 0],
    ]
    assert [stage.num_tokens for stage in step.stages] == [67, 45, 29]
    assert step.candidates.query_lens.tolist() == [8, 1, 22, 1, 33, 0]
    assert step.candidates.query_start_loc.tolist() == [0, 8, 9, 31, 32, 65, 65]
    assert [(p.index, p.start, p.num_tokens, p.first) for p in step.prefills] == [
        (2, 9, 22, 8),
        (4, 32, 33, 0),
    ]
    assert [p.num_turn_rows for p in step.prefills] == [22, 30], "generated tokens are none"
    assert step.boundary.fetched.position.tolist() == [8, 9, 10, 11]
    assert set(step.boundary.fetched.request.tolist()) == {2}


@pytest.mark.parametrize(
    "batch",
    [
        [(None, 0, 30)],
        [(None, 0, 30), (IMAGE, 30, 1), (TWO_IMAGES, 99, 1)],
        [(IMAGE, 30, 5)],
        [(IMAGE, 0, 8)],
    ],
)
def test_a_step_of_text_has_no_boundary(batch):
    step = plan(*batch)
    assert step.prefills == () and step.boundary is None


def test_a_prefill_knows_its_request():
    (prefill,) = plan((IMAGE, 0, 32)).prefills
    assert isinstance(prefill, ImagePrefill)
    assert (prefill.routing.num_prompt, prefill.routing.spans) == (PROMPT, IMAGE)
    assert prefill.routing.kept == (20, 10, 2)
    assert prefill.routing.deferred == (0, 10, 18)
    assert prefill.routing.text_prefix == 8


def test_the_seed_is_the_prompt_s():
    one, other = (RequestRouting.of(IMAGE, range(n), SCHEDULE, BLOCK) for n in (30, 31))
    again = RequestRouting.of(TWO_IMAGES, list(range(30)), SCHEDULE, BLOCK)
    seeds = [routing.seed(routing.turns.turns[-1]) for routing in (one, again, other)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_lengths_are_what_attention_kernels_take():
    step = plan((IMAGE, 12, 18), (None, 3, 1), (IMAGE, 8, 2))
    for stage in (*step.stages, step.candidates):
        for array in (stage.query_lens, stage.seq_lens, stage.query_start_loc):
            assert array.dtype == np.int32
        request, position = stage.request_and_position
        assert len(request) == len(position) == stage.num_tokens


@pytest.mark.parametrize(
    "query,held,request_,position",
    [
        ([1, 1, 1], [4, 1, 9], [0, 1, 2], [3, 0, 8]),
        ([2, 0, 1], [4, 7, 9], [0, 0, 2], [2, 3, 8]),  # as many tokens as requests, not one each
        ([0, 0], [4, 0], [], []),
        ([0, 3], [4, 3], [1, 1, 1], [0, 1, 2]),
    ],
)
def test_where_tokens_are(query, held, request_, position):
    lens = StageLengths(np.array(query, dtype=np.int32), np.array(held, dtype=np.int32))
    assert [part.tolist() for part in lens.request_and_position] == [request_, position]


@pytest.mark.parametrize(
    "computed,scheduled,offers,parked,fetched",
    [
        (0, 30, False, [], []),  # nobody will read them
        (0, 30, True, [*range(8, 28)], []),  # whole blocks of the prompt
        (0, 20, False, [*range(8, 20)], []),
        (0, 20, True, [*range(8, 20)], []),
        (20, 9, False, [*range(20, 29)], []),
        (20, 10, False, [], [*range(8, 20)]),
        (20, 10, True, [*range(20, 28)], [*range(8, 20)]),
        (29, 1, True, [], [*range(8, 29)]),
        (8, 24, True, [*range(8, 28)], []),
        (30, 1, True, [], []),
        (4, 4, True, [], []),
    ],
)
def test_what_waits_in_pages(computed, scheduled, offers, parked, fetched):
    step = plan(
        (None, 3, 1), (IMAGE, computed, scheduled), (NO_TEXT_BEFORE, 0, 1), offers_parked=offers
    )
    boundary = step.boundary

    def positions(places):
        return places.position[places.request == 1].tolist()

    assert positions(boundary.parked) == parked
    assert positions(boundary.fetched) == fetched
    assert (boundary.parked_rows[boundary.parked.request == 1] - 1 + computed).tolist() == parked


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("offers_parked", [False, True])
def test_a_plan_is_what_a_slow_reading_of_the_design_gives(schedule, offers_parked):
    for seed in range(40):
        _check_plan(schedule, offers_parked, seed)


def _check_plan(schedule, offers_parked, seed):
    rng = random.Random(seed)
    batch = [random_request(rng, schedule) for _ in range(rng.randint(1, 8))]
    scheduled = [random_scheduled(rng, request) for request in batch]
    computed = [request.num_run for request in batch]
    dense = batch[0].dense
    step = plan_of(
        [request.routing for request in batch],
        computed,
        scheduled,
        dense_stages=dense,
        offers_parked=offers_parked,
        num_stages=len(schedule.stages),
    )
    did = [request.run(now) for request, now in zip(batch, scheduled, strict=True)]
    assert step.num_tokens == sum(scheduled)
    _check_lengths(step, batch, did)
    _check_prefills(step, batch, did)
    if step.boundary is None:
        assert not any(request.waiting or d.decides for request, d in zip(batch, did, strict=True))
    else:
        _check_rows(step, did)
        _check_pages(step, batch, did, offers_parked)
        _check_shared_text(step, batch, did)


def _check_lengths(step, batch, did):
    for i, (request, d) in enumerate(zip(batch, did, strict=True)):
        for stage, lens in enumerate(step.stages):
            assert lens.query_lens[i] == len(d.stages[stage])
            assert lens.seq_lens[i] == len(request.kv[stage])
            if request.spans:
                # What the scheduler allocates for is what the worker reads and writes.
                assert request.routing.kv_length(stage, request.num_run) == lens.seq_lens[i]
        assert step.candidates.query_lens[i] == len(d.candidates)


def _check_prefills(step, batch, did):
    deciding = [i for i, d in enumerate(did) if d.decides]
    assert [prefill.index for prefill in step.prefills] == deciding
    for prefill in step.prefills:
        d = did[prefill.index]
        assert prefill.start == sum(len(before.candidates) for before in did[: prefill.index])
        assert prefill.num_tokens == len(d.candidates)
        assert prefill.first == d.candidates[0]
        prompt_rows = [p for p in d.candidates if p < batch[prefill.index].num_prompt]
        assert prefill.num_turn_rows == len(prompt_rows)


def _check_rows(step, did):
    """Every candidate's row is that of its own token, of this step or of an earlier one."""
    of_step = [(i, p) for i, d in enumerate(did) for p in d.ran]
    of_before = [(i, p) for i, d in enumerate(did) if d.decides for p in d.before]
    fetched = step.boundary.fetched
    assert list(zip(fetched.request.tolist(), fetched.position.tolist(), strict=True)) == of_before
    rows = of_step + of_before
    expect = [(i, p) for i, d in enumerate(did) for p in d.candidates]
    assert (step.boundary.source is None) == (expect == of_step)
    if step.boundary.source is not None:
        assert [rows[row] for row in step.boundary.source.tolist()] == expect
    found = [part.tolist() for part in step.candidates.request_and_position]
    assert list(zip(*found, strict=True)) == expect


def _check_pages(step, batch, did, offers_parked):
    """Who must wait is parked; what a later prompt may reuse too, in whole blocks of the prompt."""
    expect = []
    for i, (request, d) in enumerate(zip(batch, did, strict=True)):
        if request.waiting:
            expect += [(i, p) for p in d.ran if p in request.waiting]
        elif d.decides and offers_parked:
            whole = request.num_prompt // BLOCK * BLOCK
            expect += [(i, p) for p in d.ran if request.text_prefix <= p < whole]
    parked = step.boundary.parked
    found = list(zip(parked.request.tolist(), parked.position.tolist(), strict=True))
    assert found == expect
    of_step = [(i, p) for i, d in enumerate(did) for p in d.ran]
    assert [of_step[row] for row in step.boundary.parked_rows.tolist()] == found


def _check_shared_text(step, batch, did):
    """Text that has become a whole block in every stage may be read by others at once."""
    expect, text_rows = [], []
    for i, (request, d) in enumerate(zip(batch, did, strict=True)):
        text = [p for p in d.candidates if p < request.text_prefix]
        text_rows.append(len(text))
        held = {p for p in request.kv[-1] if p < request.text_prefix}
        expect += [
            (i, p) for p in text if held >= set(range(p // BLOCK * BLOCK, (p // BLOCK + 1) * BLOCK))
        ]
        if d.candidates:
            assert step.boundary.first[i] == d.candidates[0]
    assert step.boundary.text_rows.tolist() == text_rows
    if not any(prefill.first for prefill in step.prefills):
        expect = []
    shared = step.boundary.shared_text
    assert list(zip(shared.request.tolist(), shared.position.tolist(), strict=True)) == expect


@pytest.mark.parametrize(
    "batch,like",
    [
        ([(None, 0, 30), (None, 40, 1)], (0, 0, 0)),
        ([(IMAGE, 0, 6), (None, 40, 1)], (0, 0, 0)),
        ([(None, 40, 1), (IMAGE, 30, 1)], (0, 1, 2)),
        # Chunks inside an image: later stages run and hold the same.
        ([(IMAGE, 6, 9), (None, 0, 4)], (0, 1, 1)),
    ],
)
def test_stages_of_the_same_lengths(batch, like):
    step = plan(*batch)
    assert step.like_stage == like
    for stage, first in enumerate(like):
        for of in (step.query_lens, step.seq_lens):
            assert of[stage].tolist() == of[first].tolist()


def test_stages_that_hold_the_same_but_run_other_rows_differ():
    """All of an image is kept, but its tokens ran the first stage in an earlier step."""
    schedule = RerouteOptions(layers=(1, 2), keep=(1.0, 1.0)).resolve(3)
    routing = RequestRouting.of(IMAGE, range(PROMPT), schedule, BLOCK)
    step = plan_of([routing], [20], [10])
    assert step.seq_lens.tolist() == [[30]] * 3
    assert step.like_stage == (0, 1, 1)


@pytest.mark.parametrize("name", ["fastv", "pdrop", "nuwa"])
def test_published_schedules_agree_between_scheduler_and_worker(name):
    """The same with images of published sizes and every published schedule's stages."""
    schedule: RoutingSchedule = RerouteOptions(schedule=name, tier=64).resolve(32)
    for seed in range(10):
        rng = random.Random(seed)
        sizes = tuple(rng.choice((1, 65, 576)) for _ in range(rng.randint(1, 3)))
        starts = [rng.randint(1, 50)]
        for size in sizes[:-1]:
            starts.append(starts[-1] + size + rng.randint(0, 9))
        ends = tuple(start + size for start, size in zip(starts, sizes, strict=True))
        prompt = range(ends[-1] + rng.randint(1, 40))
        routing = RequestRouting.of(VisualSpans(tuple(starts), ends, sizes), prompt, schedule, 16)
        cuts = [*sorted(rng.sample(range(1, len(prompt)), 3)), len(prompt), len(prompt) + 3]
        held = [0] * len(schedule.stages)
        for before, after in zip([0, *cuts], cuts, strict=False):
            step = plan_step(
                np.array([before]),
                np.array([after - before]),
                BatchRouting.of([routing], len(schedule.stages)),
                dense_stages=routing.dense_stages,
                block_size=16,
                offers_parked=True,
            )
            for stage, lens in enumerate(step.stages):
                held[stage] += int(lens.query_lens[0])
                assert held[stage] == lens.seq_lens[0] == routing.kv_length(stage, after)
        text = len(prompt) + 3 - sum(sizes)
        assert held == [text + kept for kept in schedule.kept_per_stage(*sizes)]
