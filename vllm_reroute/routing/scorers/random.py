"""Visual tokens ranked by chance: the baseline of quality comparisons."""

from __future__ import annotations

import numpy as np
import torch

from vllm_reroute.routing.prompt_rows import PromptRows
from vllm_reroute.routing.scorers.scorer import Scorer, ScoringLayer
from vllm_reroute.to_device import to_device


class RandomScorer(Scorer):
    """Stands in for `LastTokenScorer`.

    A turn's scores depend on the prompt up to its end and the layer alone, so batches, preemptions and
    tensor-parallel ranks choose alike.
    """

    def __init__(self, at: ScoringLayer) -> None:
        self.layer = at.number

    def score(
        self, stream: torch.Tensor, positions: torch.Tensor, prompts: PromptRows
    ) -> torch.Tensor:
        """Uniform scores of all prompt tokens, fp32 [requests, width]; 0 past a prompt's end."""
        scores = np.zeros((len(prompts.lens), prompts.width), dtype=np.float32)
        for row, length, prefill in zip(scores, prompts.lens, prompts.prefills, strict=True):
            row[:length] = np.random.default_rng([prefill.seed, self.layer]).random(length)
        return to_device(scores, stream.device)
