"""What a scorer is: the interface of built-in ones and of those other distributions bring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

if TYPE_CHECKING:
    from vllm_reroute.routing.prompt_rows import PromptRows
    from vllm_reroute.routing.scorers.attention import ScoringRule


@dataclass(frozen=True, kw_only=True)
class ScoringLayer:
    """Where a scorer works.

    number: of the decoder layer whose input is scored, from 0. layer: that layer, a module of vLLM's
    with its weights, of any family. rule: which attention rows score in this model family. most_rows: rows to work
    on at a time, for scorers that need much memory for each.
    """

    number: int
    layer: Any
    rule: ScoringRule
    most_rows: int


def check_scores(scores: torch.Tensor, prompts: PromptRows, scorer: Scorer) -> None:
    """Raises ValueError for a table that is not what `Scorer.score` promises. Looks at no value."""
    promised = (len(prompts.lens), prompts.width)
    if scores.shape != promised or scores.dtype != torch.float32:
        raise ValueError(
            f"The scorer {type(scorer).__module__}.{type(scorer).__qualname__} returned "
            f"{scores.dtype} {list(scores.shape)}. It must be {torch.float32} {list(promised)}, one row "
            "per request; vllm_reroute.routing.scorers.prompt_scores makes that of one score per row."
        )


class Scorer(Protocol):
    """Ranks visual tokens at one decision of one model. Subclass it and write `score`.

    accumulates: whether scores of earlier decisions are added to it; `remove` then is refused, since
    what an earlier decision ranked low is gone.
    """

    accumulates: ClassVar[bool] = False

    def __init__(self, at: ScoringLayer) -> None:
        """Called once per decision layer, before weights are loaded."""

    def score(
        self, stream: torch.Tensor, positions: torch.Tensor, prompts: PromptRows
    ) -> torch.Tensor:
        """fp32 [requests, width], higher is kept; `prompt_scores` makes it of one per row.

        stream: [rows, hidden], the residual stream at the layer's input. positions: [rows], or
        [3, rows] with M-RoPE. prompts: which rows belong to which request, at which place of the
        table. Only scores of visual tokens are looked at.

        They must be the same on every tensor-parallel rank and depend on the request alone, not on
        the batch; nothing may wait for the device (no `.item()`, no `.cpu()`).
        """
        ...
