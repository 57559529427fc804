"""How much the last prompt token attends to each visual token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_reroute.routing.prompt_rows import PromptRows
from vllm_reroute.to_device import to_device

HeadReduction = Literal["mean", "max"]


def last_prompt_row(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of the last prompt token to each key, summed over heads (FastV, PDrop).

    query: [heads, dim]; keys: [tokens, kv_heads, dim]. Returns [tokens], fp32; higher is kept.
    """
    num_kv_heads, dim = keys.shape[1:]
    grouped = query.view(num_kv_heads, -1, dim).float()
    logits = torch.bmm(grouped, keys.permute(1, 2, 0).float()) * scale
    return logits.softmax(dim=-1).sum(dim=(0, 1))


def last_prompt_rows(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, heads: HeadReduction
) -> torch.Tensor:
    """Causal attention of the last prompt tokens to each key, mean over these tokens.

    queries: [n, heads, dim], of the last n prompt tokens in order; keys: [tokens, kv_heads, dim].
    Returns [tokens], fp32, the sum or the maximum over this rank's heads; higher is kept.
    """
    num_tokens, num_kv_heads, _ = keys.shape
    grouped = queries.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).float()
    logits = torch.einsum("kgnd,tkd->kgnt", grouped, keys.float()) * scale
    last = num_tokens - len(queries)
    causal = torch.ones(len(queries), num_tokens, dtype=torch.bool, device=keys.device).tril(last)
    rows = logits.masked_fill(~causal, -torch.inf).softmax(dim=-1).mean(dim=2).flatten(0, 1)
    return rows.amax(dim=0) if heads == "max" else rows.sum(dim=0)


@dataclass(frozen=True, kw_only=True)
class ScoringRule:
    """Which attention rows score, and how heads are combined.

    num_queries: last prompt tokens whose rows are averaged. heads: over all heads.
    """

    num_queries: int = 1
    heads: HeadReduction = "mean"


LAST_TOKEN = ScoringRule()
"""What FastV, PDrop and Reroute use, and Nüwa on LLaVA."""


def alike_on_all_ranks(scores: torch.Tensor, heads: HeadReduction) -> torch.Tensor:
    """The sum or the maximum over the heads of all tensor-parallel ranks, the same on each.

    scores: over this rank's heads.
    """
    tp_group = get_tp_group()
    if tp_group.world_size == 1:
        return scores
    if heads == "max":
        return tp_group.all_gather(scores.unsqueeze(0), dim=0).amax(dim=0)
    # Ranks must choose alike: rank 0's sum decides, whatever the reduction's rounding.
    return tp_group.broadcast(tp_group.all_reduce(scores), src=0)


class KeepsKeyRows(UnquantizedLinearMethod):
    """An unquantised q/k/v projection whose key rows can be read whenever scores are due.

    Rows are read from the weight in use. On CPU vLLM repacks the weight and drops the original,
    so they are copied just before: every load and reload of a layer comes through here.
    """

    def __init__(self, stock: UnquantizedLinearMethod, rows: slice) -> None:
        vars(self).update(vars(stock))
        self.rows = rows
        self._copied: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        before = layer.weight
        self._copied = None
        rows = self.key_rows(layer)
        copies = tuple(None if t is None else t.clone() for t in rows)
        super().process_weights_after_loading(layer)
        if len(layer.weight) != len(before):
            self._copied = copies

    def key_rows(self, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [kv, hidden] and bias [kv] or None of the keys."""
        if self._copied is not None:
            return self._copied
        bias = getattr(layer, "bias", None)
        return layer.weight.detach()[self.rows], None if bias is None else bias.detach()[self.rows]


class LastTokenScorer:
    """Scores the visual tokens of a step's image prompts at one decision layer.

    Works on the scoring layer's own input: RMSNorm, q of the last prompt token, k of every
    prompt token present, per-head norms where the model has them (Qwen3), rope, per-head softmax
    over these keys, mean over all heads. One row per request, or the few of another
    `ScoringRule`; never a map over queries.
    """

    def __init__(self, layer: nn.Module, rule: ScoringRule = LAST_TOKEN) -> None:
        self.rule = rule
        self.norm = layer.input_layernorm
        self.attention = layer.self_attn
        self.num_heads = get_tp_group().world_size * self.attention.num_heads
        modules = dict(self.attention.named_children())
        self._head_norms = {n: modules[n] for n in ("q_norm", "k_norm") if n in modules}
        # Only unquantised weights can be sliced; others use the whole fused projection.
        projection, first = self.attention.qkv_proj, self.attention.q_size
        if type(projection.quant_method) is UnquantizedLinearMethod:
            rows = slice(first, first + self.attention.kv_size)
            projection.quant_method = KeepsKeyRows(projection.quant_method, rows)

    def score(
        self, stream: torch.Tensor, positions: torch.Tensor, prompts: PromptRows
    ) -> torch.Tensor:
        """Scores of all prompt tokens, fp32 [requests, width]; 0 past a prompt's end.

        stream: [rows, hidden], the residual stream at the layer's input. positions: [rows] or
        [3, rows]. The same on every tensor-parallel rank.
        """
        rule, scale = self.rule, self.attention.scaling
        queries = self._queries_of(stream, positions, prompts)
        if prompts.are_all_rows:
            keys = self._keys(stream, positions)
        else:
            keys = self._keys(stream[prompts.rows], positions[..., prompts.rows])
        scores = stream.new_zeros(len(prompts.lens), prompts.width, dtype=torch.float32)
        for i, prompt_keys in enumerate(keys.split(prompts.lens)):
            if rule == LAST_TOKEN:
                row = last_prompt_row(queries[i][0], prompt_keys, scale)
            else:
                row = last_prompt_rows(queries[i], prompt_keys, scale, rule.heads)
            scores[i, : prompts.lens[i]] = row
        scores = alike_on_all_ranks(scores, rule.heads)
        return scores / self.num_heads if rule.heads == "mean" else scores

    def _queries_of(
        self, stream: torch.Tensor, positions: torch.Tensor, prompts: PromptRows
    ) -> tuple[torch.Tensor, ...]:
        """Per request [n, heads, dim] of its last n prompt tokens, fewer for a shorter prompt."""
        counts = [min(self.rule.num_queries, n) for n in prompts.lens]
        rows = prompts.last
        if self.rule.num_queries > 1:
            back = np.concatenate([np.arange(n)[::-1] for n in counts]).astype(np.int64)
            request = np.repeat(np.arange(len(counts)), counts)
            rows = rows[to_device(request, rows.device)] - to_device(back, rows.device)
        return self._queries(stream[rows], positions[..., rows]).split(counts)

    def _queries(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        attention = self.attention
        fused, _ = attention.qkv_proj(self.norm(states))
        queries = self._head_norm("q_norm", fused[:, : attention.q_size].contiguous())
        queries, _ = attention.rotary_emb(positions, queries, self._one_head(states))
        return queries.view(len(states), -1, attention.head_dim)

    def _keys(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        attention, normed = self.attention, self.norm(states)
        projection = attention.qkv_proj
        if isinstance(projection.quant_method, KeepsKeyRows):
            keys = nn.functional.linear(normed, *projection.quant_method.key_rows(projection))
        else:
            fused, _ = projection(normed)
            first = attention.q_size
            keys = fused[:, first : first + attention.kv_size].contiguous()
        keys = self._head_norm("k_norm", keys)
        _, keys = attention.rotary_emb(positions, self._one_head(states), keys)
        return keys.view(len(states), -1, attention.head_dim)

    def _head_norm(self, name: str, states: torch.Tensor) -> torch.Tensor:
        norm = self._head_norms.get(name)
        if norm is None:
            return states
        return norm(states.unflatten(-1, (-1, self.attention.head_dim))).flatten(-2)

    def _one_head(self, states: torch.Tensor) -> torch.Tensor:
        # Rotary embeddings take queries and keys together; the other side is not needed.
        return states.new_zeros(len(states), self.attention.head_dim)
