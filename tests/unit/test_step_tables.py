"""What the attention layers of all stages read, against a slow reading of the runner's tables."""

from __future__ import annotations

import itertools
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_reroute.attention.step_tables import StepTables
from vllm_reroute.plan.row_pieces import row_pieces
from vllm_reroute.plan.step_plan import Places
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.schedule import RerouteOptions

from .steps import KINDS, Going, Tables, plan_of, random_batch, routing_of

BLOCK = 4
MAX_REQS, MAX_TOKENS, MAX_BLOCKS = 11, 96, 24
CPU = torch.device("cpu")
UNTOUCHED = -7

SCHEDULES = {
    "uneven stages": RerouteOptions(layers=(1, 3, 8), keep=(0.5, 0.1, 0.8)).resolve(9),
    "one decision": RerouteOptions(layers=(2,), keep=(0.25,), action="remove").resolve(3),
    "encoder first": RerouteOptions(schedule="nuwa").resolve(8),
}
STEPS = {
    "decodes": ("decode", "text"),
    "nothing to decide": ("text", "decode", "before"),
    "chunks": ("inside",),
    "finishing": ("finishing", "resumed"),
    "mixed": KINDS,
}


def step_tables(schedule, fill=UNTOUCHED):
    tables = StepTables([stage.num_layers for stage in schedule.stages])
    tables.allocate(
        block_size=BLOCK,
        max_reqs=MAX_REQS,
        max_tokens=MAX_TOKENS,
        max_blocks=MAX_BLOCKS,
        device=CPU,
    )
    for tensor in tensors_of(tables):
        tensor.fill_(fill)
    return tables


def tensors_of(tables):
    return tables.block_tables, tables.slot_mappings, tables.seq_lens, tables.query_start_loc


class Step:
    """A random batch with its plan and its runner's tables, filled in."""

    def __init__(self, schedule, kinds=KINDS, *, seed=0, tables=None, batch=None):
        rng = random.Random(seed)
        self.schedule = schedule
        self.batch = batch or random_batch(rng, schedule, kinds, most_tokens=MAX_TOKENS)
        self.plan = plan_of(self.batch, schedule)
        self.padding = rng.choice((0, MAX_REQS - 8))
        self.num_reqs = len(self.batch) + self.padding
        self.num_tokens = min(self.plan.num_tokens + rng.choice((0, 5)), MAX_TOKENS)
        self.runner = Tables(
            self.batch, schedule, max_blocks=MAX_BLOCKS, padding=self.padding, seed=seed
        )
        self.tables = tables or step_tables(schedule)
        self.tables.fill(
            self.plan,
            self.runner.interleaved,
            num_reqs=self.num_reqs,
            num_tokens=self.num_tokens,
        )

    def places(self, stage):
        """(request, place in the K/V) of every row that runs the stage, in order."""
        return [
            (i, place)
            for i, request in enumerate(self.batch)
            for place in range(request.held_before(stage), request.held(stage))
        ]

    def layers(self, stage):
        """(index in the stage, row of the tables) of the stage's layers."""
        first = sum(s.num_layers for s in self.schedule.stages[:stage])
        return [(j, first + j) for j in range(self.schedule.stages[stage].num_layers)]


def check(step):
    tables, plan, batch = step.tables, step.plan, step.batch
    longest = max(r.held(s) for r in batch for s in range(len(step.schedule.stages)))
    dealt = -(-longest // BLOCK)
    running = [len(step.places(stage)) for stage in range(len(step.schedule.stages))]
    written = max(step.num_tokens, *(n for n in running if n <= MAX_TOKENS), 0)
    assert plan.num_tokens == sum(r.scheduled for r in batch)

    for stage in range(len(step.schedule.stages)):
        places = step.places(stage)
        held = [request.held(stage) for request in batch]
        lens = [request.held(stage) - request.held_before(stage) for request in batch]
        starts = [0, *np.cumsum(lens).tolist()]
        assert tables.seq_lens[stage, : step.num_reqs].tolist() == held + [0] * step.padding
        assert (
            tables.query_start_loc[stage, : step.num_reqs + 1].tolist()
            == starts + [starts[-1]] * step.padding
        )
        assert tables.seq_lens[stage, step.num_reqs :].eq(UNTOUCHED).all()
        assert tables.query_start_loc[stage, step.num_reqs + 1 :].eq(UNTOUCHED).all()

        whole = places if len(places) <= MAX_TOKENS else []
        for j, layer in step.layers(stage):
            for i, count in enumerate(held):
                own = range(-(-count // BLOCK))
                assert tables.block_tables[layer, i, : len(own)].tolist() == [
                    step.runner.block(stage, j, i, index) for index in own
                ]
            padded = tables.block_tables[layer, len(batch) : step.num_reqs, :dealt]
            assert padded.eq(0).all(), "padded rows hold the null block"
            expect = [step.runner.slot(stage, j, i, place) for i, place in whole]
            expect += [PAD_SLOT_ID] * (written - len(whole))
            assert tables.slot_mappings[layer, :written].tolist() == expect

    assert tables.block_tables[:, step.num_reqs :].eq(UNTOUCHED).all()
    assert tables.block_tables[:, :, dealt:].eq(UNTOUCHED).all()
    assert tables.slot_mappings[:, written:].eq(UNTOUCHED).all()


@pytest.mark.parametrize("kinds", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_step(schedule, kinds):
    for seed in range(12):
        check(Step(schedule, kinds, seed=seed))


def test_stages_of_more_rows_than_a_step_holds_get_no_slots_here():
    """They run in pieces. The check itself expects padding in their place."""
    schedule = SCHEDULES["uneven stages"]
    seen = set()
    for seed in range(60):
        step = Step(schedule, ("finishing",), seed=seed)
        seen |= {len(step.places(s)) > MAX_TOKENS for s in range(4)}
        check(step)
    assert seen == {True, False}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_full_table_fits(schedule):
    batch = [Going(None, MAX_BLOCKS * BLOCK - 1, 1)] * 8
    check(Step(schedule, batch=batch))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_no_two_layers_share_a_slot(schedule):
    step = Step(schedule, seed=5)
    slots = [
        slot
        for stage in range(len(schedule.stages))
        for _, layer in step.layers(stage)
        for slot in step.tables.slot_mappings[layer].tolist()
        if slot >= 0
    ]
    assert slots and len(set(slots)) == len(slots)


@pytest.mark.parametrize("seed", range(4))
def test_tensors_stay_where_they_are(seed):
    """Steps that grow and shrink: a CUDA graph replays with the addresses it was captured with."""
    schedule = SCHEDULES["uneven stages"]
    tables = step_tables(schedule)
    seen = set()
    for n in range(10):
        step = Step(schedule, seed=100 * seed + n, tables=tables)
        views = [tables.views(s, step.num_reqs, step.num_tokens) for s in range(4)]
        dummy = tables.fill_dummy(n % 4, common_of(3, 7))
        seen.add(
            tuple(
                tensor.data_ptr()
                for tensor in (
                    *tensors_of(tables),
                    *(t for v in views for t in (v.seq_lens, v.query_start_loc)),
                    *(t for v in views for t in (*v.block_tables, *v.slot_mappings)),
                )
            )
        )
        assert dummy.seq_lens.data_ptr() == tables.seq_lens[n % 4].data_ptr()
    assert len(seen) == 1
    tables.allocate(block_size=BLOCK, max_reqs=1, max_tokens=1, max_blocks=1, device=CPU)
    assert [list(tensor.shape) for tensor in tensors_of(tables)] == [
        [9, MAX_REQS, MAX_BLOCKS],
        [9, MAX_TOKENS],
        [4, MAX_REQS],
        [4, MAX_REQS + 1],
    ]


def test_room_is_taken_before_the_pool_is_sized():
    """Of all tables: its own stay, the runner's are set aside until it allocates them."""
    tables = StepTables([2, 7])
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=BLOCK),
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_REQS, max_num_batched_tokens=MAX_TOKENS),
        model_config=SimpleNamespace(max_model_len=MAX_BLOCKS * BLOCK - 1),
        device_config=SimpleNamespace(device=CPU),
    )
    tables.reserve(config, other_layers=3)
    assert tables.block_tables.shape == (9, MAX_REQS, MAX_BLOCKS)
    assert tables._set_aside.nbytes == 2 * 4 * (9 + 3) * MAX_REQS * MAX_BLOCKS
    where, held = tables.block_tables.data_ptr(), weakref.ref(tables._set_aside)
    tables.reserve(config, other_layers=3)
    assert tables._set_aside is held()
    tables.release_reserve()
    assert held() is None
    with pytest.raises(AssertionError):
        tables.allocate(
            block_size=BLOCK, max_reqs=1, max_tokens=1, max_blocks=MAX_BLOCKS + 1, device=CPU
        )
    assert tables.block_tables.data_ptr() == where


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_views_have_the_size_asked_for(schedule):
    step = Step(schedule, seed=3)
    tables = step.tables
    for num_reqs, num_tokens in ((step.num_reqs, step.num_tokens), (1, 0), (2, 9), (2, 9), (1, 9)):
        for stage in range(len(schedule.stages)):
            views = tables.views(stage, num_reqs, num_tokens)
            assert views.seq_lens.tolist() == tables.seq_lens[stage, :num_reqs].tolist()
            starts = tables.query_start_loc[stage, : num_reqs + 1]
            assert views.query_start_loc.tolist() == starts.tolist()
            for j, layer in step.layers(stage):
                table = tables.block_tables[layer, :num_reqs]
                assert views.block_tables[j].tolist() == table.tolist()
                slots = tables.slot_mappings[layer, :num_tokens]
                assert views.slot_mappings[j].tolist() == slots.tolist()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_slots_of_any_tokens(schedule):
    stages = range(len(schedule.stages))
    for seed, stage in itertools.product(range(4), stages):
        step, rng = Step(schedule, seed=seed), random.Random(seed)
        held = [(i, place) for i, r in enumerate(step.batch) for place in range(r.held(stage))]
        some = rng.sample(held, min(len(held), 20))
        places = Places(*np.array(some, dtype=np.int64).reshape(-1, 2).T)
        slots = step.tables.slots_of(stage, places)
        for j, _ in step.layers(stage):
            expect = [step.runner.slot(stage, j, i, place) for i, place in some]
            assert slots[j].tolist() == expect
            assert step.tables.slots_of(stage, places, j).tolist() == [expect]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("most", [1, 7, 40])
def test_pieces_write_each_row_once_and_see_what_is_behind_it(schedule, most):
    seen = 0
    for seed in range(12):
        step = Step(schedule, seed=seed)
        for stage in range(len(schedule.stages)):
            pieces = row_pieces(step.plan, stage, most)
            seen += len(pieces)
            rows = [row for piece in pieces for row in piece.rows.tolist()]
            places = step.places(stage)
            assert not pieces or sorted(rows) == list(range(len(places)))
            for piece in pieces:
                views = step.tables.piece_views(stage, piece.lengths)
                assert len(piece.rows) <= most
                own = [places[row] for row in piece.rows]
                for j, layer in step.layers(stage):
                    expect = [step.runner.slot(stage, j, i, place) for i, place in own]
                    assert views.slot_mappings[j].tolist() == expect
                    table = step.tables.block_tables[layer, : len(step.batch)]
                    assert views.block_tables[j].data_ptr() == table.data_ptr()
                counts = [sum(i == request for i, _ in own) for request in range(len(step.batch))]
                assert views.query_start_loc.tolist() == [0, *np.cumsum(counts).tolist()]
                last = {i: place + 1 for i, place in own}
                assert views.seq_lens.tolist() == [last.get(i, 0) for i in range(len(step.batch))]
    assert seen


def common_of(num_reqs, num_tokens):
    """What a dummy run says of its batch."""
    starts = torch.linspace(0, num_tokens, num_reqs + 1).to(torch.int32)
    return SimpleNamespace(
        num_reqs=num_reqs,
        num_actual_tokens=num_tokens,
        seq_lens=torch.arange(5, 5 + num_reqs, dtype=torch.int32),
        query_start_loc=starts,
    )


@pytest.mark.parametrize("num_tokens", [3, 17])
def test_a_dummy_run_writes_nowhere(num_tokens):
    """Behind a real step, whose slots are still there."""
    step = Step(SCHEDULES["uneven stages"], ("text",), seed=2, batch=[Going(None, 0, 20)] * 3)
    common = common_of(3, num_tokens)
    for stage in range(4):
        assert step.tables.views(stage, 3, num_tokens).slot_mappings[0].ge(0).all()
        views = step.tables.fill_dummy(stage, common)
        assert len(views.slot_mappings) == step.schedule.stages[stage].num_layers
        assert all(slots.tolist() == [PAD_SLOT_ID] * num_tokens for slots in views.slot_mappings)
        assert views.seq_lens.tolist() == [5, 6, 7]
        assert views.query_start_loc.tolist() == common.query_start_loc.tolist()


def test_a_request_without_rows_keeps_its_length():
    """A chunk inside an image: later stages hold the text before it and run nothing."""
    schedule = SCHEDULES["uneven stages"]
    routing = routing_of(VisualSpans((9,), (30,)), 40, schedule, BLOCK)
    step = Step(schedule, batch=[Going(routing, 12, 10), Going(None, 7, 1)])
    check(step)
    assert step.tables.seq_lens[:, 0].tolist() == [22, 8, 8, 8]
    assert step.tables.query_start_loc[1, :3].tolist() == [0, 0, 1]
