"""From scores to the rows that run: top-k per request, in original order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_reroute.routing.prompt_rows import PromptRows
from vllm_reroute.to_device import to_device


def select_rows(
    scores: torch.Tensor,
    text: torch.Tensor,
    prompts: PromptRows,
    num_kept: Sequence[int],
    num_selected: int,
) -> torch.Tensor:
    """Rows of the layout that run the next stage, ascending: int64 [num_selected].

    scores: fp32 [requests, width]. text: bool [rows], rows of the layout that run whatever their
    score; the others are visual tokens. num_kept: visual tokens to keep per request. Ties go to the
    lower position, so a request's choice does not depend on what else is in the batch.
    """
    table, width = prompts.table, prompts.width
    stays = prompts.once("stays", lambda: text[table])
    order = scores.masked_fill(stays, -torch.inf).sort(dim=1, descending=True, stable=True)
    ranked = table.gather(1, order.indices).flatten()
    best = [np.arange(kept) + i * width for i, kept in enumerate(num_kept)]
    kept = ranked[to_device(np.concatenate(best), scores.device)]
    return text.index_fill(0, kept, True).nonzero_static(size=num_selected).squeeze(1)
