"""Nothing of a step waits for the device: on tensors without values, reading one back is an error."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_reroute.attention.key_pages import KeyPlaces, read_keys
from vllm_reroute.attention.metadata import StageMetadata
from vllm_reroute.attention.parked import PagePlaces, ParkedExchange, ParkedStates
from vllm_reroute.attention.step_kernel import KernelFill
from vllm_reroute.attention.step_tables import StepTables
from vllm_reroute.plan.row_pieces import row_pieces
from vllm_reroute.plan.step_plan import Places
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.routing.decoder import RoutedDecoder
from vllm_reroute.routing.deferred_buffer import DeferredTokenBuffer
from vllm_reroute.routing.fused import FusedNorm
from vllm_reroute.routing.held_tokens import HeldTokens
from vllm_reroute.routing.scorers import ScoringLayer, attention
from vllm_reroute.routing.scorers.attention import LAST_TOKEN, ScoringRule
from vllm_reroute.schedule import RerouteOptions, RoutingSchedule
from vllm_reroute.schedule.published import SCORERS

from .steps import Going, Tables, plan_of, routing_of
from .test_key_pages import PlainImpl

HIDDEN, DEPTH = 8, 8
HEADS, DIM, BLOCK = 2, 4, 4
MAX_BLOCKS, CPU = 12, torch.device("cpu")
SCHEDULES = [
    {"layers": [2, 5], "keep": [0.5, 0.25], "action": "reroute"},
    {"layers": [2, 5], "keep": [0.5, 0.25], "scorer": "accumulated"},
    {"layers": [2, 5], "keep": [0.5, 0.25], "scorer": "random"},
    {"layers": [2, 5], "keep": [0.5, 0.25], "action": "remove"},
    {"schedule": "nuwa", "action": "remove"},
    {"schedule": "nuwa", "variant": "A"},
    {"schedule": "nuwa", "variant": "B"},
]
SPANS = VisualSpans((6,), (22,))


class Attention(nn.Module):
    """A decoder layer's attention as far as scorers read it, of parts that only multiply."""

    def __init__(self, name: str, tables: StepTables, stage: int, index: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scaling = HEADS, DIM, DIM**-0.5
        self.q_size = self.kv_size = HEADS * DIM
        self.qkv_proj = SimpleNamespace(
            weight=torch.randn(3 * HEADS * DIM, HIDDEN), quant_method=UnquantizedLinearMethod()
        )
        self.attn = SimpleNamespace(
            layer_name=name,
            impl=PlainImpl(),
            tables=tables,
            place=SimpleNamespace(stage=stage, index=index),
            head_size=DIM,
            kv_cache=torch.zeros(99, HEADS, BLOCK, 2 * DIM),
        )

    def rotary_emb(self, positions: torch.Tensor, *states: torch.Tensor) -> list[torch.Tensor]:
        return [part * positions.float().unsqueeze(1) for part in states]


class Projection(SimpleNamespace):
    def __call__(self, states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return states @ self.weight.T, None


def layer(name: str, tables: StepTables, stage: int, index: int) -> SimpleNamespace:
    own = Attention(name, tables, stage, index)
    own.qkv_proj = Projection(**vars(own.qkv_proj))
    return SimpleNamespace(self_attn=own, input_layernorm=lambda states: states / 2)


class Unlaunched:
    """Stands in for the kernel that fills the tables on GPUs; all that leads to it is real."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **constants: None


class Decoder:
    """The real loop over stages with the real scorers, around layers that only add."""

    def __init__(self, schedule: RoutingSchedule, rule: ScoringRule = LAST_TOKEN) -> None:
        self.schedule = schedule
        self.tables = StepTables([stage.num_layers for stage in schedule.stages])
        self.tables.allocate(
            block_size=BLOCK, max_reqs=8, max_tokens=64, max_blocks=MAX_BLOCKS, device=CPU
        )
        self.tables.kernel = KernelFill(self.tables, Unlaunched())
        routed = RoutedDecoder.__new__(RoutedDecoder)
        nn.Module.__init__(routed)
        routed.schedule, routed._decided, routed.held_tokens = schedule, None, None
        routed._names = tuple(f"layers.{n}.attn" for n in range(DEPTH))
        self.runs: list[int] = []
        routed._runs = tuple(self._run for _ in schedule.pieces)
        routed._norm = FusedNorm(lambda hidden, residual: (hidden + residual, residual))
        routed._is_compiled = False
        routed._scorers = {}
        for decision in schedule.decisions:
            at = decision.scored_at
            if at is None:
                continue
            stage = schedule.stage_of(at)
            index = at - schedule.stages[stage].first_layer
            scored = layer(routed._names[at], self.tables, stage, index)
            # The one look at a layout, which does wait, comes before.
            attention = scored.self_attn.attn
            entries = self.tables.entries_of(Places(*np.zeros((2, 1), dtype=np.int64)))
            read_keys(attention, KeyPlaces.of(attention, entries))
            place = ScoringLayer(number=at, layer=scored, rule=rule, most_rows=64)
            routed._scorers[at] = SCORERS[schedule.scorer](place)
        buffer = DeferredTokenBuffer(128, HIDDEN, torch.float32, CPU)
        routed.waiting = buffer if schedule.reroutes else None
        parked = ParkedStates.__new__(ParkedStates)
        nn.Module.__init__(parked)
        parked.width = HIDDEN + (schedule.encoder_ratio is not None)
        parked.layer_name, parked.dtype = "layers.8.parked", torch.float32
        parked.kv_cache = torch.zeros(99, HEADS, BLOCK, 2 * DIM)
        routed._parked = (parked,)
        self.routed = routed

    def _run(
        self,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        additions: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.runs.append(len(hidden))
        return hidden + 1, hidden if residual is None else residual

    def step(self, batch: list[Going], most: int = 64) -> tuple[torch.Tensor, Any]:
        """Run a step on tensors without values; its final states and its plan."""
        plan = plan_of(batch, self.schedule, BLOCK)
        tables = Tables(batch, self.schedule, max_blocks=MAX_BLOCKS, block_size=BLOCK)
        count = plan.num_tokens
        with FakeTensorMode(allow_non_fake_inputs=True):
            self.tables.fill(plan, tables.interleaved, num_reqs=len(batch), num_tokens=count)
        metadata: dict[str, Any] = {}
        for number, stage in enumerate(self.schedule.stages):
            pieces = tuple(
                (
                    torch.from_numpy(piece.rows),
                    StageMetadata(plan, None, self.tables.piece_views(number, piece.lengths)),
                )
                for piece in row_pieces(plan, number, most)
            )
            own = StageMetadata(plan, None, None, pieces)
            names = self.routed._names[stage.first_layer : stage.end_layer]
            metadata |= dict.fromkeys(names, own)
        boundary = plan.boundary
        metadata["layers.8.parked"] = ParkedExchange(
            rows=torch.from_numpy(boundary.parked_rows),
            written=page_places(len(boundary.parked)),
            read=page_places(len(boundary.fetched)),
            positions=torch.from_numpy(boundary.fetched.position),
            source=None if boundary.source is None else torch.from_numpy(boundary.source),
        )
        context = ForwardContext(no_compile_layers={}, attn_metadata=metadata, slot_mapping={})
        with (
            override_forward_context(context),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            padded = count + 3
            states, positions = torch.randn(padded, HIDDEN), torch.arange(padded)
            scores = torch.rand(padded) if self.schedule.encoder_ratio else None
            return self.routed(states, positions, None, scores), plan


def page_places(count: int) -> PagePlaces:
    return PagePlaces(torch.ones(1, count, dtype=torch.int64), torch.zeros(count).long())


def going(schedule: RoutingSchedule, spans: VisualSpans | None, computed: int, end: int) -> Going:
    return Going(routing_of(spans, 30, schedule, BLOCK), computed, end - computed)


STEPS = {
    "whole": [(SPANS, 0, 30), (None, 7, 8)],
    "a chunk": [(SPANS, 4, 20), (None, 7, 8)],
    "finishing, with fetched rows and cached keys": [(SPANS, 20, 30), (None, 7, 8)],
    "all of it": [(SPANS, 20, 30), (SPANS, 2, 9), (SPANS, 0, 33), (None, 0, 12), (SPANS, 29, 30)],
}


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "get_tp_group", lambda: SimpleNamespace(world_size=1))


@pytest.mark.parametrize("most", [64, 24], ids=["whole stages", "pieces"])
@pytest.mark.parametrize("batch", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(
    "options", SCHEDULES, ids=lambda options: "-".join(map(str, options.values()))
)
def test_routed_step_reads_nothing_back(
    options: dict[str, Any], batch: list[Any], most: int
) -> None:
    schedule = RerouteOptions.from_mapping(options).resolve(DEPTH)
    decoder = Decoder(schedule)
    requests = [going(schedule, *request) for request in batch]
    output, plan = decoder.step(requests, most)
    assert output.shape == (plan.num_tokens + 3, HIDDEN)
    pieces = [len(row_pieces(plan, stage, most)) for stage in range(len(schedule.stages))]
    of_runs = [max(1, pieces[schedule.stage_of(piece.first_layer)]) for piece in schedule.pieces]
    if schedule.boundary:
        of_runs[0] = 1
    assert len(decoder.runs) == sum(of_runs)


def test_the_steps_are_what_they_say() -> None:
    schedule = RerouteOptions.from_mapping(SCHEDULES[0]).resolve(DEPTH)
    plans = {
        name: plan_of([going(schedule, *request) for request in batch], schedule, BLOCK)
        for name, batch in STEPS.items()
    }
    assert [len(plan.prefills) for plan in plans.values()] == [1, 0, 1, 3]
    assert [len(plan.boundary.fetched) for plan in plans.values()] == [0, 0, 16, 41]
    assert [
        max(p.first for p in plan.prefills or [going]) if plan.prefills else 0
        for plan in plans.values()
    ] == [0, 0, 4, 4]
    assert len(row_pieces(plans["all of it"], 1, 24)) > 1


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_rules_of_several_tokens_read_nothing_back(heads: Any) -> None:
    schedule = RerouteOptions.from_mapping(SCHEDULES[3]).resolve(DEPTH)
    decoder = Decoder(schedule, ScoringRule(num_queries=3, heads=heads))
    decoder.step([going(schedule, *request) for request in STEPS["all of it"]])


@pytest.mark.parametrize("most", [64, 12], ids=["whole stages", "pieces"])
def test_bringing_tokens_back_reads_nothing_back(most: int) -> None:
    """A later question's decisions, beside a picture's own and text; what stages hold is copied with blocks."""
    schedule = RerouteOptions.from_mapping({**SCHEDULES[0], "history": "recall"}).resolve(DEPTH)
    schedule = replace(schedule, marker=(8, 9))
    prompt = [1] * 24 + [8, 9, 1, 1, 8, 9]
    routing = routing_of(SPANS, prompt, schedule, BLOCK)
    decoder = Decoder(schedule)
    attentions = [scorer.attention.attn for scorer in decoder.routed._scorers.values()]
    held = decoder.routed.held_tokens = HeldTokens([attentions[0], *attentions])
    with FakeTensorMode(allow_non_fake_inputs=True):
        held.copy([(3, 5), (4, 6)])
    batch = [Going(routing, 26, 4), Going(routing, 0, 26), Going(None, 7, 1), Going(routing, 28, 2)]
    output, plan = decoder.step(batch, most)
    assert output.shape == (plan.num_tokens + 3, HIDDEN)
    assert [prefill.num_recalled for prefill in plan.prefills] == [16, 0, 16]


def test_this_test_would_notice() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.randn(3).argmax().item()
