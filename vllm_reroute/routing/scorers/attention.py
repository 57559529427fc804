"""How much the last prompt token attends to each visual token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod

from vllm_reroute.attention.key_pages import KeyPlaces, read_keys, write_keys
from vllm_reroute.attention.layer import RoutedAttention
from vllm_reroute.routing.fused import Angles, FusedNorm, FusedRotary
from vllm_reroute.routing.prompt_rows import PromptRows, QueryRows
from vllm_reroute.routing.scorers.scorer import Scorer, ScoringLayer

HeadReduction = Literal["mean", "max"]


def attention_rows(
    queries: torch.Tensor,
    keys: torch.Tensor,
    weights: torch.Tensor | None,
    hidden: torch.Tensor | None,
    scale: float,
    *,
    heads: HeadReduction,
) -> torch.Tensor:
    """Attention of the last prompt tokens to each key, their weighted mean.

    queries: [requests, n, heads, dim], of the last n tokens in order; keys: [requests, width,
    kv_heads, dim]. weights: [requests, n]; None for n = 1. hidden: bool [requests, n, width], keys
    a query does not see; None where each sees all. Returns [requests, width], fp32: the maximum over
    this rank's heads or, for the mean, their sum; higher is kept, and 0 past a prompt's end.
    """
    count, n, num_heads, dim = queries.shape
    width, num_kv_heads = keys.shape[1:3]
    # One batch of matrices per request and K/V head, whose rows are queries.
    grouped = queries.float().transpose(1, 2)
    if count == 1:
        # In the order they are in, which matrix products take, too.
        by_head = keys.float().transpose(1, 2)
    else:
        by_head = keys.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    logits = torch.baddbmm(
        by_head.new_empty(1, 1, 1),
        grouped.reshape(count * num_kv_heads, -1, dim),
        by_head.flatten(0, 1).transpose(1, 2),
        beta=0,
        alpha=scale,
    ).view(count, num_heads, n, width)
    if hidden is not None:
        logits.masked_fill_(hidden.unsqueeze(1), -torch.inf)
    rows = logits.softmax(dim=-1)
    if weights is not None:
        rows = (rows * weights[:, None, :, None]).sum(dim=2, keepdim=True)
    return (rows.amax(dim=1) if heads == "max" else rows.sum(dim=1)).squeeze(1)


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
    """An unquantised q/k/v projection that gives keys alone whenever scores are due.

    Their rows are read from the weight in use. On CPU vLLM repacks the weight and drops the original,
    so they are copied just before, and packed alike: every load and reload of a layer comes through here.
    """

    def __init__(self, stock: UnquantizedLinearMethod, rows: slice) -> None:
        vars(self).update(vars(stock))
        self.rows = rows
        self._packed: nn.Module | None = None

    def process_weights_after_loading(self, layer: Any) -> None:
        before, copied = layer.weight, nn.Module()
        for name, part in zip(("weight", "bias"), self._key_rows(layer), strict=True):
            own = None if part is None else nn.Parameter(part.clone(), requires_grad=False)
            copied.register_parameter(name, own)
        super().process_weights_after_loading(layer)
        self._packed = None
        if len(layer.weight) != len(before):
            super().process_weights_after_loading(copied)
            self._packed = copied

    def keys(self, layer: Any, states: torch.Tensor) -> torch.Tensor:
        """[n, kv] of states [n, hidden] after the norm."""
        packed: Any = self._packed
        if packed is not None:
            return self.apply(packed, states, packed.bias)
        return nn.functional.linear(states, *self._key_rows(layer))

    def _key_rows(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [kv, hidden] and bias [kv] or None of the keys."""
        bias = getattr(layer, "bias", None)
        return layer.weight.detach()[self.rows], None if bias is None else bias.detach()[self.rows]


class DecoderAttention(Protocol):
    """What scores are computed with: the names of vLLM's decoders, the same in all families."""

    attn: RoutedAttention
    qkv_proj: QKVParallelLinear
    rotary_emb: Any
    q_size: int
    kv_size: int
    head_dim: int
    scaling: float

    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...


class LastTokenScorer(Scorer):
    """Scores the visual tokens of a step's image prompts at one decision layer.

    Works on the scoring layer's own input: RMSNorm, q of the last prompt token, k of every
    prompt token present, per-head norms where the model has them (Qwen3), rope, per-head softmax
    over these keys, their sum over all heads, which ranks like their mean. One row per request, or the few of another
    `ScoringRule`; never a map over queries.
    """

    def __init__(self, at: ScoringLayer) -> None:
        self.rule = at.rule
        self.most_rows = at.most_rows
        self.norm = FusedNorm(at.layer.input_layernorm)
        self.attention: DecoderAttention = at.layer.self_attn
        self.rotary = FusedRotary(self.attention.rotary_emb)
        # vLLM's layers share their rotary embedding, so decisions share what is known of it.
        self._angles = "angles", id(self.attention.rotary_emb)
        modules = dict(self.attention.named_children())
        self._head_norms = {n: FusedNorm(modules[n]) for n in ("q_norm", "k_norm") if n in modules}
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
        queries = prompts.query_rows(self.rule.num_queries)
        keys, asking = self._keys_and_queries(stream, positions, prompts, queries)
        scores = attention_rows(
            asking.view(len(prompts.lens), -1, *asking.shape[1:]),
            self._key_table(keys, prompts),
            queries.weights,
            queries.hidden,
            self.attention.scaling,
            heads=self.rule.heads,
        )
        return alike_on_all_ranks(scores, self.rule.heads)

    def _key_table(self, keys: torch.Tensor, prompts: PromptRows) -> torch.Tensor:
        """Keys [requests, width, kv_heads, dim] of all tokens present, cached ones included.

        keys: [s + P, kv_heads, dim], of shared text and of the prompts' rows.
        """
        layer, num_shared, count = self.attention.attn, len(prompts.shared), len(prompts.lens)
        if num_shared or any(prompts.num_cached):
            once = prompts.in_step.once
            entries = once("entries", lambda: layer.tables.entries_of(prompts.in_pages))
            shared, cached = KeyPlaces.of(layer, entries).split(num_shared)
            if num_shared:
                write_keys(layer, keys[:num_shared], shared)
            keys = torch.cat((read_keys(layer, cached, once).to(keys.dtype), keys[num_shared:]))
        if count == 1:
            return keys.unsqueeze(0)
        return keys.index_select(0, prompts.keys).view(count, -1, *keys.shape[1:])

    def _keys_and_queries(
        self,
        stream: torch.Tensor,
        positions: torch.Tensor,
        prompts: PromptRows,
        queries: QueryRows,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [s + P, kv_heads, dim] of shared text and of the prompts' rows, and queries [requests *
        n, heads, dim] of those that score; in parts where rows are very many."""
        once = prompts.in_layout.once
        if prompts.are_all_rows and not len(prompts.shared) and len(stream) <= self.most_rows:
            states = self.norm(stream)
            angles = once(self._angles, lambda: self.rotary.angles(positions, stream))
            of_queries = once((self._angles, "queries"), lambda: angles.at(queries.rows))
            is_last = prompts.is_layout and self.rule.num_queries == 1
            last = states[-1:] if is_last else states.index_select(0, queries.rows)
            return self._keys(states, angles), self._queries(last, of_queries)
        rows, num_keys = queries.behind_keys, len(prompts.key_rows)
        angles = once(self._angles, lambda: self.rotary.angles(positions[..., rows], stream))
        keys, asking = [], []
        for start in range(0, len(rows), self.most_rows):
            states = self.norm(stream.index_select(0, rows[start : start + self.most_rows]))
            own = angles.at(slice(start, start + len(states)))
            of_keys = min(max(num_keys - start, 0), len(states))
            if of_keys:
                keys.append(self._keys(states[:of_keys], own.at(slice(of_keys))))
            if of_keys < len(states):
                asking.append(self._queries(states[of_keys:], own.at(slice(of_keys, None))))
        return _joined(keys), _joined(asking)

    def _queries(self, states: torch.Tensor, angles: Angles) -> torch.Tensor:
        """states: after the norm, as for `_keys`."""
        attention = self.attention
        fused, _ = attention.qkv_proj(states)
        first = attention.q_size
        queries, keys = fused[:, :first], fused[:, first : first + attention.kv_size]
        queries, _ = self.rotary(angles, self._head_norm("q_norm", queries), keys)
        return self._by_head(queries)

    def _keys(self, states: torch.Tensor, angles: Angles) -> torch.Tensor:
        attention = self.attention
        projection = attention.qkv_proj
        if isinstance(projection.quant_method, KeepsKeyRows):
            keys = projection.quant_method.keys(projection, states)
        else:
            fused, _ = projection(states)
            first = attention.q_size
            keys = fused[:, first : first + attention.kv_size]
        keys = self._head_norm("k_norm", keys)
        # Rotary embeddings take queries and keys together; whatever is in the other side will do.
        others = keys.new_empty(keys.shape[0], attention.head_dim)
        _, keys = self.rotary(angles, others, keys)
        return self._by_head(keys)

    def _head_norm(self, name: str, states: torch.Tensor) -> torch.Tensor:
        norm = self._head_norms.get(name)
        if norm is None:
            return states
        return norm(self._by_head(states)).flatten(-2)

    def _by_head(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(states.shape[0], -1, self.attention.head_dim)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
