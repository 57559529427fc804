"""A stage's rows in pieces: all of them once, few at a time, and none reads what is not there yet."""

import random
from itertools import pairwise

import numpy as np

from vllm_reroute.plan.batch_routing import BatchRouting
from vllm_reroute.plan.planning import plan_step
from vllm_reroute.plan.row_pieces import row_pieces

from .slow_steps import BLOCK, SCHEDULES, SlowRequest, random_scheduled, random_spans


class SharedBlocks:
    """Requests whose prompts begin alike share blocks of text, as the prefix cache lets them.

    A slot is named by the block that holds it: (owner's number, place in its K/V). The same names
    serve all stages after the first decision, whose blocks are shared alike.
    """

    def __init__(self, rng, schedule):
        self.rng, self.schedule = rng, schedule
        self.cached = {}  # (family, block) -> slots
        self.requests, self.slots, self.scheduled, self.names = [], [], [], []
        self.written = set()

    def add(self, *, earlier):
        """A request of one of three families of prompts; `earlier`: it has run some steps before."""
        rng, number = self.rng, len(self.requests)
        num_prompt, family = rng.randint(1, 60), rng.randrange(3)
        image = num_prompt >= 8 and rng.random() < 0.6
        spans = random_spans(rng, num_prompt) if image else None
        request = SlowRequest(self.schedule, num_prompt, spans, rng)
        # Prompts of a family are equal up to here.
        alike = min(rng.choice((0, 20, 60)), request.text_prefix, num_prompt - 1) // BLOCK
        slots = []
        while len(slots) // BLOCK < alike and (family, len(slots) // BLOCK) in self.cached:
            slots += self.cached[family, len(slots) // BLOCK]
        if slots:
            request.run(len(slots))
        self.requests.append(request)
        self.slots.append(slots)
        self.names.append(number)
        if earlier:
            request.run(random_scheduled(rng, request))
            self._own(number, len(request.kv[-1]))
            self.written.update(slots)
        now = random_scheduled(rng, request)
        self.scheduled.append(now)
        whole = min(request.num_run + now, request.text_prefix) // BLOCK
        self._own(number, whole * BLOCK)
        for block in range(min(whole, alike)):
            own = slots[block * BLOCK : (block + 1) * BLOCK]
            self.cached.setdefault((family, block), own)

    def _own(self, number, length):
        slots = self.slots[number]
        slots += [(self.names[number], place) for place in range(len(slots), length)]

    def shuffle(self):
        """A batch's order is not that of arrival."""
        order = self.rng.sample(range(len(self.requests)), len(self.requests))
        for name in ("requests", "slots", "scheduled", "names"):
            setattr(self, name, [getattr(self, name)[number] for number in order])

    def plan(self):
        dense = self.requests[0].dense
        plan = plan_step(
            np.array([request.num_run for request in self.requests]),
            np.array(self.scheduled),
            BatchRouting.of([r.routing for r in self.requests], len(self.schedule.stages)),
            dense_stages=dense,
            block_size=BLOCK,
            offers_parked=True,
        )
        for number, length in enumerate(plan.stages[dense].seq_lens.tolist()):
            self._own(number, length)
        return plan, range(dense, len(self.schedule.stages))


def steps(seed):
    """A step of several requests, some of which arrive in it."""
    rng = random.Random(seed)
    shared = SharedBlocks(rng, SCHEDULES[seed % 2])
    for _ in range(rng.randint(0, 4)):
        shared.add(earlier=True)
    for _ in range(rng.randint(1, 8)):
        shared.add(earlier=False)
    shared.shuffle()
    return shared, rng.randint(1, 40)


def rows_of(piece):
    """Rows of a piece by request: (request, [its rows among the stage's])."""
    ends = piece.lengths.query_start_loc.tolist()
    for request, (start, end) in enumerate(pairwise(ends)):
        if start < end:
            yield request, piece.rows[start:end].tolist()


def test_pieces_hold_every_row_once_and_in_order():
    for seed in range(150):
        check_rows(*steps(seed))


def check_rows(shared, most):
    plan, stages = shared.plan()
    for stage in stages:
        lengths = plan.stages[stage]
        pieces = row_pieces(plan, stage, most)
        if plan.boundary is None or lengths.num_tokens <= most:
            assert pieces == ()
            continue
        assert all(0 < len(piece.rows) <= most for piece in pieces)
        assert sorted(np.concatenate([p.rows for p in pieces])) == [*range(lengths.num_tokens)]
        done = lengths.query_start_loc[:-1].tolist()
        begin = (lengths.seq_lens - lengths.query_lens).tolist()
        for piece in pieces:
            runs = dict(rows_of(piece))
            for request, rows in runs.items():
                assert rows == [*range(done[request], done[request] + len(rows))]
                done[request] += len(rows)
                seen = begin[request] + done[request] - lengths.query_start_loc[request]
                assert piece.lengths.seq_lens[request] == seen
            assert [r for r, n in enumerate(piece.lengths.query_lens) if n] == sorted(runs)
            assert all(n for r, n in enumerate(piece.lengths.seq_lens) if r in runs)
            assert not any(n for r, n in enumerate(piece.lengths.seq_lens) if r not in runs)


def test_no_row_reads_what_is_not_written_yet():
    """Of its own request, or of another whose blocks it has found in this very step."""
    for seed in range(150):
        check_reads(*steps(seed))


def check_reads(shared, most):
    plan, stages = shared.plan()
    for stage in stages:
        lengths = plan.stages[stage]
        pieces = row_pieces(plan, stage, most)
        if not pieces:
            continue
        written = set(shared.written)
        # What has run before, by whomever: all but the slots of this step's rows.
        begin = (lengths.seq_lens - lengths.query_lens).tolist()
        slots = shared.slots
        this_step = {
            slot
            for request, own in enumerate(slots)
            for slot in own[begin[request] : lengths.seq_lens[request]]
        }
        written -= this_step
        for piece in pieces:
            reads = set()
            for request, rows in rows_of(piece):
                last = begin[request] + rows[-1] - lengths.query_start_loc[request]
                first = last + 1 - len(rows)
                written.update(slots[request][first : last + 1])
                reads.update(slots[request][: last + 1])
            # All layers of a piece write K/V before they read.
            missing = {slot for slot in reads - written if slot in this_step}
            assert not missing


def test_the_reader_s_check_sees_shared_blocks():
    """The property above is about something: steps share blocks, and wrong orders break it."""
    shares = sum(
        any(slot[0] != n for n, own in zip(shared.names, shared.slots, strict=True) for slot in own)
        for shared, _ in map(steps, range(150))
    )
    assert shares > 30
