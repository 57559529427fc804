"""From scores to the rows that run: top-k per request, in original order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_reroute.routing.prompt_rows import PromptRows
from vllm_reroute.to_device import to_device


def select_rows(
    scores: torch.Tensor,
    visual: torch.Tensor,
    prompts: PromptRows,
    num_kept: Sequence[int],
    num_selected: int,
) -> torch.Tensor:
    """Rows of the layout that run the next stage, ascending: int64 [num_selected].

    scores: fp32 [requests, width]. visual: bool [rows], the candidates of the layout. num_kept:
    visual tokens to keep per request. All rows that are no candidates run; ties go to the lower
    position, so a request's choice does not depend on what else is in the batch.
    """
    candidates = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    candidates[prompts.slots] = visual[prompts.rows]
    candidates = candidates.view_as(scores)
    order = scores.masked_fill(~candidates, -torch.inf).sort(dim=1, descending=True, stable=True)
    places = torch.arange(prompts.width, device=scores.device).expand_as(order.indices)
    rank = torch.empty_like(order.indices).scatter_(1, order.indices, places)
    limit = to_device(np.asarray(num_kept), scores.device).unsqueeze(1)
    kept = candidates & (rank < limit)
    runs = ~visual
    runs[prompts.rows] |= kept.flatten()[prompts.slots]
    return runs.nonzero_static(size=num_selected).squeeze(1)
