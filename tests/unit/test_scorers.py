"""The attention scorer against softmax attention written out, and with a cached beginning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.routing.prompt_rows import PromptRows
from vllm_reroute.routing.prompt_table import hidden_keys
from vllm_reroute.routing.scorers import ScoringLayer
from vllm_reroute.routing.scorers.attention import (
    LAST_TOKEN,
    KeepsKeyRows,
    LastTokenScorer,
    ScoringRule,
    attention_rows,
)

from .routed_model import CPU, Conversation, Conversations


def slowly(queries, keys, weights, scale, heads):
    """One prompt: queries [n, heads, dim] of its last tokens, keys [tokens, kv_heads, dim]."""
    n, num_heads, _ = queries.shape
    tokens, kv_heads, _ = keys.shape
    rows = torch.zeros(num_heads, tokens)
    for head in range(num_heads):
        own = keys[:, head * kv_heads // num_heads].float()
        for back in range(n):
            seen = max(tokens - back, 1)
            logits = own[:seen] @ queries[n - 1 - back, head].float() * scale
            rows[head, :seen] += weights[n - 1 - back] * torch.softmax(logits, dim=0)
    return rows.amax(dim=0) if heads == "max" else rows.sum(dim=0)


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("num_queries", [1, 2, 3])
@pytest.mark.parametrize("num_heads,kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lens", [(11,), (9, 2, 14, 1)], ids=["one prompt", "four prompts"])
def test_rows_are_rows_of_softmax_attention(lens, num_heads, kv_heads, num_queries, reduction):
    torch.manual_seed(0)
    count, width, scale = len(lens), max(lens), 16**-0.5
    queries = torch.randn(count, num_queries, num_heads, 16)
    keys = torch.randn(count, width, kv_heads, 16)
    weights = torch.rand(count, num_queries) if num_queries > 1 else torch.ones(count, 1)
    hidden = torch.from_numpy(hidden_keys(np.array(lens), num_queries))
    found = attention_rows(
        queries,
        keys,
        weights if num_queries > 1 else None,
        hidden if hidden.any() else None,
        scale,
        heads=reduction,
    )
    assert found.shape == (count, width) and found.dtype == torch.float32
    for i, length in enumerate(lens):
        expect = slowly(queries[i], keys[i, :length], weights[i], scale, reduction)
        torch.testing.assert_close(found[i, :length], expect, rtol=1e-5, atol=1e-6)
        assert found[i, length:].eq(0).all(), "nothing past a prompt's end"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_computed_in_fp32(dtype):
    torch.manual_seed(1)
    queries, keys = torch.randn(1, 1, 8, 32).to(dtype), torch.randn(1, 9, 2, 32).to(dtype)
    (found,) = attention_rows(queries, keys, None, None, 32**-0.5, heads="mean")
    expect = slowly(queries[0], keys[0], [1.0], 32**-0.5, "mean")
    torch.testing.assert_close(found, expect, rtol=1e-5, atol=1e-6)
    assert float(found.sum()) == pytest.approx(8, rel=1e-5), "a share per head"


def test_rows_agree_with_torch_s_attention():
    torch.manual_seed(2)
    queries, keys = torch.randn(1, 1, 8, 32), torch.randn(1, 9, 2, 32)
    shares = torch.nn.functional.scaled_dot_product_attention(
        queries[0].transpose(0, 1),
        keys[0].permute(1, 0, 2).repeat_interleave(4, dim=0),
        torch.eye(9).expand(8, 9, 9),
    )
    (found,) = attention_rows(queries, keys, None, None, 32**-0.5, heads="mean")
    torch.testing.assert_close(found, shares.sum(dim=(0, 1)))


@pytest.fixture(scope="module")
def model(routed_model):
    return routed_model({"layers": [2, 5], "keep": [0.5, 0.25], "action": "remove"})


LAYER = 5
RULES = [LAST_TOKEN, ScoringRule(num_queries=3, heads="max")]
# Spans of the visual tokens, tokens of the prompt.
PROMPTS = [
    (VisualSpans((70,), (110,)), 130),
    (VisualSpans((40, 100), (60, 150)), 180),
    (VisualSpans((3,), (40,)), 47),
]


class Scored:
    """Prompts that end in one step, from where `cached` says; a decode goes first.

    stage: whose layout the scorer looks at; None for the candidates.
    """

    def __init__(self, model, rule, cached, stage=None, most_rows=512):
        self.model = model
        requests = [Conversation(None, torch.zeros(20, model.hidden_size), computed=19)]
        for (spans, num_prompt), computed in zip(PROMPTS, cached, strict=True):
            routing = RequestRouting.of(spans, range(num_prompt), model.schedule, model.block_size)
            states = torch.zeros(num_prompt, model.hidden_size)
            requests.append(Conversation(routing, states, computed))
        self.run = Conversations(model, requests)
        running = range(len(requests))
        scheduled = [len(r.states) - r.computed for r in requests]
        self.plan = self.run.plan(running, scheduled).plan
        self.prompts = PromptRows.of(self.plan, stage, CPU)
        self.lengths = self.plan.candidates if stage is None else self.plan.stages[stage]
        layer = next(
            layer
            for piece, run in zip(model.schedule.pieces, model.decoder._runs, strict=True)
            for layer in run.layers
            if piece.first_layer == LAYER
        )
        at = ScoringLayer(number=LAYER, layer=layer, rule=rule, most_rows=most_rows)
        self.scorer = LastTokenScorer(at)
        self.attention = layer.self_attn.attn

    def streams(self):
        """[(states, positions)] per request: of all tokens the stage holds after the step."""
        torch.manual_seed(7)
        return [
            (torch.randn(int(n), self.model.hidden_size), torch.arange(int(n)) * 2)
            for n in self.lengths.seq_lens
        ]

    def rows(self):
        """Stream and positions of what runs; keys of what lies before it are put into the pages."""
        rows = []
        for i, (states, positions) in enumerate(self.streams()):
            before = len(states) - int(self.lengths.query_lens[i])
            if before:
                self._write(i, states[:before], positions[:before])
            rows.append((states[before:], positions[before:]))
        return [torch.cat(parts) for parts in zip(*rows, strict=True)]

    @torch.inference_mode()
    def scores(self, seen=None):
        """seen: a list that gets the number of rows of each call of the layer's norm."""
        with set_current_vllm_config(self.model.config):
            stream, positions = self.rows()
            if seen is not None:
                norm = self.scorer.norm
                self.scorer.norm = lambda states: (seen.append(len(states)), norm(states))[1]
            return self.scorer.score(stream, positions, self.prompts)

    def _write(self, request, states, positions):
        angles = self.scorer.rotary.angles(positions, states)
        keys = self.scorer._keys(self.scorer.norm(states), angles)
        place = self.attention.place
        table = self.run.tables[place.stage][request, place.index :: place.num_layers].long()
        size = self.model.block_size
        slots = torch.tensor([int(table[p // size]) * size + p % size for p in range(len(states))])
        self.attention.impl.do_kv_cache_update(
            self.attention, keys, keys.neg(), self.model.pool, slots
        )


@pytest.mark.parametrize("rule", RULES, ids=["last token", "three tokens"])
@pytest.mark.parametrize("stage", [None, 1], ids=["candidates", "kept"])
@pytest.mark.parametrize("cached", [(32, 0, 0), (64, 32, 0), (100, 179, 0)])
def test_cached_text_scores_as_text_that_runs(model, rule, stage, cached):
    fresh, later = Scored(model, rule, (0, 0, 0), stage), Scored(model, rule, cached, stage)
    assert later.prompts.num_cached == tuple(
        min(c, p.routing.text_prefix) for c, p in zip(cached, later.plan.prefills, strict=True)
    )
    assert any(later.prompts.num_cached) and later.prompts.lens == fresh.prompts.lens
    torch.testing.assert_close(later.scores(), fresh.scores(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cached", [(0, 0, 0), (64, 32, 0)])
@pytest.mark.parametrize("most_rows", [1, 50])
def test_keys_of_many_rows_are_computed_some_at_a_time(model, cached, most_rows):
    together = Scored(model, LAST_TOKEN, cached).scores()
    scored = Scored(model, LAST_TOKEN, cached, most_rows=most_rows)
    seen = []
    torch.testing.assert_close(scored.scores(seen), together, rtol=1e-5, atol=1e-6)
    queries = len(PROMPTS)
    assert max(seen) <= max(most_rows, queries)
    assert sum(seen) == queries + len(scored.prompts.shared) + len(scored.prompts.rows)


def test_sliced_and_fused_projections_agree(model, monkeypatch):
    """Quantised weights cannot be sliced: the whole projection runs, and gives the same keys."""
    scored = Scored(model, LAST_TOKEN, (64, 0, 0))
    sliced, projection = scored.scores(), scored.scorer.attention.qkv_proj
    assert isinstance(projection.quant_method, KeepsKeyRows)
    monkeypatch.setattr(projection, "quant_method", UnquantizedLinearMethod())
    torch.testing.assert_close(scored.scores(), sliced, rtol=1e-5, atol=1e-6)


def test_a_prompt_s_scores_do_not_depend_on_the_batch(model, monkeypatch):
    import tests.unit.test_scorers as own

    together = Scored(model, LAST_TOKEN, (64, 0, 0))
    table, streams = together.scores(), together.streams()
    monkeypatch.setattr(own, "PROMPTS", PROMPTS[:1])
    alone = Scored(model, LAST_TOKEN, (64,))
    alone.streams = lambda: streams[:2]
    torch.testing.assert_close(alone.scores()[0], table[0, :130], rtol=1e-5, atol=1e-6)
