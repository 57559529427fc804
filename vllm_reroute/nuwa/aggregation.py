"""What collectors take in from the patches around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from vllm_reroute.nuwa.grid import Grid, proximity

_MAX_WEIGHTS = 2**22
"""Weights held at a time: 16 MiB."""

_EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """The numbers in which Nüwa differs from model to model.

    pillar_quantile: anchors at or above this quantile of the anchors' salience are pillars.
    reach: distance from which on a patch has no weight, as a share of the padded grid's diagonal.
    convex: whether a collector is a weighted mean; else its surroundings are added to it.
    """

    pillar_quantile: float
    reach: float
    convex: bool


LLAVA = Aggregation(pillar_quantile=0.55, reach=math.sqrt(280 / 1058), convex=False)
"""As published for 24 x 24 patches: a reach of sqrt(280) cells, of a diagonal of sqrt(1058)."""

QWEN2_5_VL = Aggregation(pillar_quantile=0.10, reach=0.8, convex=True)


def collect(
    states: torch.Tensor,
    features: torch.Tensor,
    salience: torch.Tensor,
    anchors: torch.Tensor,
    grid: Grid,
    recipe: Aggregation,
) -> torch.Tensor:
    """The states, those of collectors replaced. Pillars and patches that are no anchors stay.

    With W_ij = max(0, cosine of features i and j) * proximity of cells i and j, collector i becomes
    the sum over j of W_ij / (sum_k W_ik) * states_j; where the recipe is not convex, its own weight
    is set to 1 afterwards. Both sums go over all patches of the image, in fp32.

    states: [patches, hidden]; features: [patches, dim]; salience: [patches], fp32;
    anchors: [n] int64. Returns [patches, hidden] in the states' type.
    """
    features = normalize(features.float(), dim=-1)
    sources = states.float()
    reach = recipe.reach * grid.padded.diagonal or 1.0
    collected = []
    for rows in anchors.split(max(1, _MAX_WEIGHTS // grid.num_cells)):
        weights = (features[rows] @ features.T).relu() * proximity(rows, grid, reach)
        shares = weights / (weights.sum(dim=-1, keepdim=True) + _EPSILON)
        if not recipe.convex:
            shares.scatter_(1, rows.unsqueeze(1), 1.0)
        collected.append(shares @ sources)
    pillar = is_pillar(salience[anchors], recipe.pillar_quantile).unsqueeze(1)
    collected_states = torch.cat(collected).to(states.dtype)
    return states.index_copy(0, anchors, torch.where(pillar, states[anchors], collected_states))


def is_pillar(salience: torch.Tensor, quantile: float) -> torch.Tensor:
    """bool [n]: anchors whose salience [n] is at or above its (interpolated) quantile."""
    return salience >= torch.quantile(salience, quantile)
