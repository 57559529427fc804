"""What routing knows of one image request, on the host, before anything has run.

Scheduler and worker derive it from the same prompt, so they agree on every length without a word
between them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.schedule import RoutingSchedule
from vllm_reroute.schedule.request_options import RequestOptions


@dataclass(frozen=True, eq=False)
class RequestRouting:
    """What stays the same for one image request over its whole life.

    spans: its visual tokens. prompt: its token ids; the last one scores. kept: per stage, the
    visual tokens that run there. text_prefix: prompt tokens before the block that holds the first
    visual one; they run like text and are cached like text, in all stages.
    dense_stages: stages before the first decision, 1 or 0: they run every token.
    """

    spans: VisualSpans
    prompt: Sequence[int]
    kept: tuple[int, ...]
    text_prefix: int
    dense_stages: int

    @classmethod
    def of(
        cls,
        spans: VisualSpans | None,
        prompt: Sequence[int] | None,
        schedule: RoutingSchedule,
        block_size: int,
        extra_args: Mapping[str, Any] | None = None,
    ) -> RequestRouting | None:
        """None for a request without visual tokens.

        block_size: tokens per K/V block. extra_args: the request's, which may choose how much it
        keeps; raises ValueError for a choice that admission should have refused.
        """
        if spans is None:
            return None
        options = RequestOptions.of(extra_args)
        if options is not None:
            schedule = replace(schedule, keep=options.keep_ratios(schedule))
        return cls(
            spans=spans,
            prompt=prompt or (),
            kept=_kept(schedule, spans.sizes),
            text_prefix=spans.first // block_size * block_size,
            dense_stages=int(schedule.encoder_ratio is None),
        )

    @property
    def num_prompt(self) -> int:
        """Prompt tokens, placeholders included."""
        return len(self.prompt)

    @cached_property
    def deferred(self) -> np.ndarray:
        """[stages] int64: visual tokens that do NOT run there."""
        return self.spans.num_visual - np.array(self.kept, dtype=np.int64)

    @cached_property
    def seed(self) -> int:
        """A number that depends on the prompt alone, so that chance falls the same way again."""
        return zlib.crc32(np.asarray(self.prompt, dtype=np.int64).tobytes())

    def kv_length(self, stage: int, num_computed: int) -> int:
        """K/V entries of a stage once `num_computed` tokens have run the step they were given.

        A stage after the first decision has run the text prefix until the prompt's last token is
        there; then its decisions are taken, and it has run all text and what it keeps.
        """
        if num_computed >= self.num_prompt:
            return num_computed - self.spans.num_visual + self.kept[stage]
        if stage < self.dense_stages:
            return num_computed
        return min(num_computed, self.text_prefix)


@lru_cache(maxsize=4096)
def _kept(schedule: RoutingSchedule, image_sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(schedule.kept_per_stage(*image_sizes))
