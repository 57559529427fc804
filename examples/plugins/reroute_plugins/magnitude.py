"""`magnitude`: tokens whose states are longest are kept; the question is not asked."""

import torch

from vllm_reroute.routing.scorers import PromptRows, Scorer, prompt_scores


class MagnitudeScorer(Scorer):
    def score(
        self, stream: torch.Tensor, positions: torch.Tensor, prompts: PromptRows
    ) -> torch.Tensor:
        return prompt_scores(stream.float().norm(dim=-1), prompts)
