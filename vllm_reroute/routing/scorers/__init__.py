"""What ranks visual tokens at a decision: one scorer per file, higher scores are kept."""

from vllm_reroute.routing.prompt_rows import PromptRows, prompt_scores
from vllm_reroute.routing.scorers.scorer import Scorer, ScoringLayer

__all__ = ["PromptRows", "Scorer", "ScoringLayer", "prompt_scores"]
