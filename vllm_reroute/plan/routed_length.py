"""How many K/V entries a layer holds for a request: the rule scheduler and worker share."""

from __future__ import annotations

from functools import lru_cache

from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.schedule.budget import num_kept_of_images


def routed_length(
    num_tokens: int,
    spans: VisualSpans | None,
    keep_ratio: float,
    encoder_ratio: float | None = None,
) -> int:
    """K/V entries of a request's first `num_tokens` tokens in a stage of `keep_ratio`.

    All text tokens, and at most the kept visual ones (`num_kept_of_images`). Which visual tokens
    are kept does not matter, so the scheduler knows the length before the worker has decided.
    """
    if spans is None:
        return num_tokens
    visual = spans.num_before(num_tokens)
    kept = _num_kept(spans.sizes, keep_ratio, encoder_ratio)
    return num_tokens - visual + min(visual, kept)


# The scheduler asks for every request, group and step.
_num_kept = lru_cache(maxsize=4096)(num_kept_of_images)
