"""Which visual tokens a decision layer keeps."""

import torch
from torch import Tensor


def num_kept(num_visual: int, keep: float, num_candidates: int) -> int:
    """A share of the request's original visual tokens, at least one, at most what is left."""
    return min(max(1, int(num_visual * keep)), num_candidates)


def last_prompt_row(query: Tensor, keys: Tensor) -> Tensor:
    """Attention of the last prompt token to each prompt token present, averaged over heads.

    query: [heads, dim]; keys: [heads, tokens, dim], both after rope. Returns [tokens], fp32;
    higher is kept.
    """
    scale = query.shape[-1] ** -0.5
    logits = torch.einsum("hd,htd->ht", query.float(), keys.float()) * scale
    return logits.softmax(dim=-1).mean(dim=0)


def highest(scores: Tensor, candidates: list[int], count: int) -> list[int]:
    """The `count` best candidates in ascending order; of equal scores the lower position wins.

    scores: [candidates], in the order of `candidates`, which is ascending.
    """
    values = scores.tolist()
    ranked = sorted(range(len(candidates)), key=lambda i: (-values[i], i))
    return sorted(candidates[i] for i in ranked[:count])


def attention_rows(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention of the last tokens to all tokens present, each to none after itself.

    queries: [heads, queries, dim], the last ones; keys: [heads, tokens, dim], both after rope.
    Returns [heads, queries, tokens], fp32.
    """
    num_queries, num_tokens = queries.shape[1], keys.shape[1]
    visible = torch.ones(num_queries, num_tokens, dtype=torch.bool).tril(num_tokens - num_queries)
    logits = queries.float() @ keys.float().transpose(1, 2) * queries.shape[-1] ** -0.5
    return logits.masked_fill(~visible, float("-inf")).softmax(dim=-1)
