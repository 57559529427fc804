"""The last prompt token's attention, summed over this and all earlier decisions."""

from vllm_reroute.routing.scorers.attention import LastTokenScorer


class AccumulatedScorer(LastTokenScorer):
    """Later words of an answer may need what the last prompt token no longer looks at."""

    accumulates = True
