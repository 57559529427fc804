"""A step's tokens through its decisions, and what is told of them, against a reader who keeps a
dictionary of tokens."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_reroute.routing.step_decisions import StepDecisions
from vllm_reroute.routing.token_state import TokenState
from vllm_reroute.schedule import RerouteOptions

from .steps import KINDS, plan_of, random_batch

HIDDEN = 3
OPTIONS = {
    "reroute": RerouteOptions(layers=(1, 3, 6), keep=(0.5, 0.1, 0.8)),
    "remove": RerouteOptions(layers=(1, 3, 6), keep=(0.6, 0.3, 0.2), action="remove"),
    "nothing to decide": RerouteOptions(layers=(1, 3, 6), keep=(1.0, 0.4, 1.0)),
    "encoder, then remove": RerouteOptions(schedule="nuwa", action="remove"),
    "encoder, gone": RerouteOptions(schedule="nuwa", variant="A"),
    "encoder, back": RerouteOptions(schedule="nuwa", variant="B"),
}


class Reader:
    """Candidates by row: who they are, their residual stream, and who may still be chosen."""

    def __init__(self, batch, schedule, stream):
        self.batch, self.schedule = batch, schedule
        self.tokens = [(i, p) for i, r in enumerate(batch) for p in r.candidates]
        self.stream = dict(enumerate(stream.unbind()))
        self.alive = list(self.stream)
        self.deciding = [
            i
            for i, r in enumerate(batch)
            if r.routing and r.computed < r.routing.num_prompt <= r.end
        ]
        self.noted = {}

    def is_visual(self, row):
        request, place = self.tokens[row]
        routing = self.batch[request].routing
        if routing is None or request not in self.deciding:
            return False
        spans = routing.spans
        return any(a <= place < b for a, b in zip(spans.starts, spans.ends, strict=True))

    def prompt_of(self, request):
        """Live rows of a prompt, without tokens generated behind it; None for each cached token."""
        routing = self.batch[request].routing
        rows = [
            row
            for row in self.alive
            if self.tokens[row][0] == request and self.tokens[row][1] < routing.num_prompt
        ]
        return [None] * self.batch[request].candidates.start + rows

    def table(self, scores):
        """[requests, width] of a score per row; cached tokens score very high, to no effect."""
        prompts = [self.prompt_of(request) for request in self.deciding]
        table = torch.zeros(len(prompts), max(map(len, prompts)))
        for line, rows in zip(table, prompts, strict=True):
            line[: len(rows)] = torch.tensor([99.0 if r is None else scores[r] for r in rows])
        return table

    def chosen(self, scores, stage):
        """Live rows that run: text, and of each prompt's visual tokens the best."""
        running = [row for row in self.alive if not self.is_visual(row)]
        for request in self.deciding:
            own = [
                row for row in self.prompt_of(request) if row is not None and self.is_visual(row)
            ]
            best = sorted(own, key=lambda row: (-scores[row], row))
            running += best[: self.batch[request].routing.kept[stage]]
        return sorted(running)

    def visual_of(self, request, rows):
        return [row for row in rows if self.tokens[row][0] == request and self.is_visual(row)]

    def note(self, stage, running, scores):
        """Remember who runs a stage, and, unless all candidates do, what they were ranked by."""
        ranked = {row: scores[row] for row in self.alive} if running != self.alive else {}
        self.noted[stage] = set(running), ranked

    def check_told(self, request, turn):
        routing = self.batch[request].routing
        rows = self.visual_of(request, range(len(self.tokens)))
        stages = range(len(self.schedule.stages))
        runs = [[s not in self.noted or row in self.noted[s][0] for s in stages] for row in rows]
        back = [sum(r[s] and not all(r[:s]) for r in runs) for s in stages]
        assert (turn.end, list(turn.brought_back)) == (routing.num_prompt, back)
        if routing.explain != "scores":
            assert turn.told is None if not routing.explain else turn.told.tolist() == runs
            return
        scores = [[self.noted.get(s, ((), {}))[1].get(row, np.nan) for s in stages] for row in rows]
        np.testing.assert_array_equal(turn.told, np.stack((runs, scores), axis=-1))


def wanting(rng, going):
    """The same request, which wants to be told something or nothing."""
    explain = rng.choice((False, True, "scores"))
    return replace(going, routing=going.routing and replace(going.routing, explain=explain))


@pytest.mark.parametrize("three", [False, True], ids=["positions", "three positions"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_any_step(options, three):
    for seed in range(15):
        check_step(options.resolve(8), three, seed)


def check_step(schedule, three, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        batch = [wanting(rng, going) for going in random_batch(rng, schedule, KINDS)]
        plan = plan_of(batch, schedule)
        if plan.prefills:
            break
    count = plan.candidates.num_tokens
    stream = torch.randn(count, HIDDEN)
    positions = torch.randint(99, (3, count) if three else (count,))
    reader = Reader(batch, schedule, stream)
    state, decisions = TokenState(plan, stream.clone(), positions), StepDecisions(plan)
    assert len(reader.tokens) == count

    for decision in schedule.decisions:
        stage = schedule.stage_of(decision.layer)
        state.merge()
        expect = torch.stack([reader.stream[row] for row in reader.alive])
        torch.testing.assert_close(state.candidates.stream, expect)
        # Few different scores, so that there are ties.
        scores = [float(rng.randint(0, 4)) for _ in range(count)]
        state.scores = reader.table(scores)
        assert state.prompts(stage).width == state.scores.shape[1]
        choice = state.choose(stage, removes=decision.removes)
        decisions.add(choice, removes=decision.removes)
        running = reader.chosen(scores, stage)
        reader.note(stage, running, scores)
        assert state.running.rows.tolist() == running
        assert len(running) == plan.stages[stage].num_tokens
        assert torch.equal(state.running.positions, positions[..., running])
        assert state.running.visual.tolist() == [reader.is_visual(row) for row in running]
        torch.testing.assert_close(
            state.hidden, torch.stack([reader.stream[row] for row in running])
        )
        assert state.residual is None
        if decision.removes:
            reader.alive = running
        for _ in range(rng.randint(1, 2)):  # a stage may be cut where a later decision is scored
            state.merge()
            hidden, residual = torch.randn(2, len(running), HIDDEN)
            state.hidden, state.residual = hidden, residual
            reader.stream.update(zip(running, (hidden + residual).unbind(), strict=True))
    turns = decisions.to_host().turns()
    assert sorted(turns) == reader.deciding
    for request, turn in turns.items():
        reader.check_told(request, turn)


def test_waiting_tokens_come_back_unchanged():
    schedule = OPTIONS["reroute"].resolve(8)
    batch = random_batch(random.Random(3), schedule, ("finishing",))
    plan = plan_of(batch, schedule)
    stream = torch.randn(plan.candidates.num_tokens, HIDDEN)
    state = TokenState(plan, stream.clone(), torch.arange(len(stream)))
    state.scores = torch.rand(len(plan.prefills), state.prompts(1).width)
    state.choose(1, removes=False)
    waiting = sorted(set(range(len(stream))) - set(state.running.rows.tolist()))
    state.hidden, state.residual = torch.full_like(state.hidden, 5), state.hidden
    state.merge()
    assert waiting and torch.equal(state.candidates.stream[waiting], stream[waiting])
    ran = state.running.rows
    assert torch.equal(state.candidates.stream[ran], stream[ran] + 5)


def test_a_step_without_prefills_decides_nothing():
    schedule = OPTIONS["reroute"].resolve(8)
    batch = random_batch(random.Random(0), schedule, ("inside", "text"))
    plan = plan_of(batch, schedule)
    assert plan.boundary is not None and not plan.prefills
    count = plan.candidates.num_tokens
    state = TokenState(plan, torch.zeros(count, HIDDEN), torch.zeros(count))
    assert state.running is state.candidates
