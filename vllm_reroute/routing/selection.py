"""From scores to the rows that run: top-k per request, in original order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_reroute.routing.prompt_rows import PromptRows


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
    table = prompts.table
    stays = prompts.in_layout.once("stays", lambda: _stays(text, prompts))
    order = scores.masked_fill(stays, -torch.inf).sort(dim=1, descending=True, stable=True)
    most = max(num_kept)
    best = order.indices[:, :most]
    best = (best if prompts.is_layout else table.gather(1, best)).flatten()
    if min(num_kept) < most:
        best = best[prompts.first_of_each(num_kept)]
    return text.index_fill(0, best, True).nonzero_static(size=num_selected).squeeze(1)


def _stays(text: torch.Tensor, prompts: PromptRows) -> torch.Tensor:
    """bool [requests, width]: places that nobody chooses."""
    stays = text[prompts.table]
    return stays if prompts.held is None else stays | prompts.held
