"""The kernel that fills the tables on GPUs, in Triton's interpreter, against the host."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

from vllm_reroute.attention import step_kernel
from vllm_reroute.attention.step_kernel import KernelFill, fill_kernel
from vllm_reroute.attention.step_tables import RunnerLengths
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.to_device import to_device

from .steps import KINDS, Going, Tables, plan_of, random_batch, routing_of
from .test_step_tables import (
    BLOCK,
    MAX_BLOCKS,
    MAX_REQS,
    MAX_TOKENS,
    SCHEDULES,
    UNTOUCHED,
    step_tables,
)

UNROUTED = ("text", "decode", "before")
interpreted = InterpretedFunction(fill_kernel.fn)


class Pair:
    """Tables filled by the kernel, and others by the host."""

    def __init__(self, schedule):
        self.schedule = schedule
        self.host, self.kernel = step_tables(schedule), step_tables(schedule)
        self.kernel.kernel = KernelFill(self.kernel, interpreted)

    def fill(self, batch, *, padding=0, more_tokens=0, seed=0, lengths=True, runner=None):
        """One step of both; `lengths`: whether the runner's own are at hand."""
        plan = plan_of(batch, self.schedule)
        runner = runner or Tables(
            batch, self.schedule, max_blocks=MAX_BLOCKS, padding=padding, seed=seed
        )
        num_reqs = len(batch) + padding
        ends = torch.tensor([request.end for request in batch] + [0] * padding, dtype=torch.int32)
        counts = torch.tensor([0] + [r.scheduled for r in batch] + [0] * padding)
        own = RunnerLengths(ends, counts.cumsum(0).to(torch.int32))
        for tables in (self.host, self.kernel):
            tables.fill(
                plan,
                runner.interleaved,
                num_reqs=num_reqs,
                num_tokens=min(plan.num_tokens + more_tokens, MAX_TOKENS),
                lengths=own if lengths else None,
            )
        return plan

    def check(self, batch):
        expect, found = self.host, self.kernel
        assert torch.equal(found.seq_lens, expect.seq_lens)
        assert torch.equal(found.query_start_loc, expect.query_start_loc)
        assert torch.equal(found.slot_mappings, expect.slot_mappings)
        for number, stage in enumerate(self.schedule.stages):
            layers = slice(stage.first_layer, stage.end_layer)
            for i, request in enumerate(batch):
                own = layers, i, slice(0, -(-request.held(number) // BLOCK))
                assert torch.equal(found.block_tables[own], expect.block_tables[own])


@pytest.mark.parametrize("kinds", [KINDS, UNROUTED], ids=["routed", "unrouted"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_as_the_host_does(schedule, kinds):
    """Steps of one engine: what one leaves behind must not show in the next."""
    pair, rng = Pair(schedule), random.Random(1)
    for seed in range(4):
        batch = random_batch(rng, schedule, kinds, most_tokens=MAX_TOKENS)
        padding, more = rng.choice((0, MAX_REQS - 8)), rng.choice((0, 5))
        plan = pair.fill(batch, padding=padding, more_tokens=more, seed=seed, lengths=seed != 3)
        pair.check(batch)
        assert kinds is KINDS or plan.boundary is None
    assert not any(t.eq(UNTOUCHED).all() for t in (pair.kernel.seq_lens, pair.kernel.slot_mappings))


def test_stages_of_more_rows_than_a_step_holds_get_no_slots():
    """Prompts of which nearly all has run: few tokens of the step, many candidates."""
    pair = Pair(SCHEDULES["uneven stages"])
    routing = routing_of(VisualSpans((2,), (8,)), 58, pair.schedule, BLOCK)
    batch = [Going(routing, 50, 8)] * 3
    plan = pair.fill(batch, more_tokens=5)
    assert [stage.num_tokens > MAX_TOKENS for stage in plan.stages] == [False, True, True, True]
    pair.check(batch)


@pytest.mark.parametrize("padding", [0, 3])
def test_nobody_at_all(padding):
    pair = Pair(SCHEDULES["uneven stages"])
    tables = [torch.zeros(padding, n * MAX_BLOCKS, dtype=torch.int32) for n in (1, 2, 5, 1)]
    runner = SimpleNamespace(interleaved=tables)
    pair.fill([], padding=padding, more_tokens=4, runner=runner)
    pair.check([])
    assert pair.kernel.query_start_loc[:, : padding + 1].eq(0).all()
    assert pair.kernel.slot_mappings[:, :4].eq(-1).all()


def test_decodes_of_the_same_batch_copy_nothing_to_the_device(monkeypatch):
    """What the kernel reads is the runner's; of ours it needs what has not changed."""
    copied = []
    monkeypatch.setattr(
        step_kernel, "to_device", lambda *array: copied.append(array) or to_device(*array)
    )
    pair = Pair(SCHEDULES["uneven stages"])
    batch = random_batch(random.Random(3), pair.schedule, ("decode",))
    runner = Tables(batch, pair.schedule, max_blocks=MAX_BLOCKS)
    later = [replace(request, computed=request.end, scheduled=1) for request in batch]
    pair.fill(batch, runner=runner)
    assert len(copied) == 3, "what stages defer, and where the runner's tables are"
    pair.fill(later, runner=runner)
    assert len(copied) == 3
    pair.check(later)
    pair.fill(later, runner=runner, lengths=False)
    assert len(copied) == 4, "the plan's lengths, in one"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_for_gpus(capability):
    """The interpreter takes Python; a GPU's compiler does not take all of it."""
    constants = {"BLOCK": 16, "PAD": -1, "TILE": 128}
    wide = ("interleaved", "interleaved_strides", "slots")
    narrow = ("seq_lens", "starts", "deferred", "layer_facts", "block_tables")
    kinds = dict.fromkeys(wide, "*i64") | dict.fromkeys(narrow, "*i32")
    kinds |= dict.fromkeys(("out_seq_lens", "out_starts"), "*i32")
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=fill_kernel,
        signature={name: kinds.get(name, "i32") for name in fill_kernel.arg_names},
        constexprs=constants,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["ptx"]
