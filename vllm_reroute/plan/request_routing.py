"""What routing knows of one image request, on the host, before anything has run.

Scheduler and worker derive it from the same prompt, so they agree on every length without a word
between them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from vllm_reroute.plan.turns import Turn, Turns, cut_at_markers
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.schedule import RoutingSchedule
from vllm_reroute.schedule.request_options import Explain, RequestOptions


@dataclass(frozen=True, eq=False)
class RequestRouting:
    """What stays the same for one image request over its whole life.

    spans: its visual tokens. prompt: its token ids. turns: what is ranked together, and by which
    token; a single one that ends with the prompt, unless its history keeps its choice; the first
    begins with the text prefix. keep: ratios per decision layer. text_prefix: prompt tokens before
    the block that holds the first visual one; they run like text and are cached like text, in all
    stages.
    dense_stages: stages before the first decision, 1 or 0: they run every token.
    keeps_turns: whether what finished turns have kept stays, see `Turns`.
    explain: what it wants to be told of its decisions, see `Explain`.
    """

    spans: VisualSpans
    prompt: Sequence[int]
    turns: Turns
    keep: tuple[float, ...]
    text_prefix: int
    dense_stages: int
    keeps_turns: bool
    explain: Explain

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
        keeps, and what becomes of it in later turns; raises ValueError for what admission should
        have refused.
        """
        if spans is None:
            return None
        options = RequestOptions.of(extra_args)
        if options is not None:
            schedule = options.applied(schedule)
        prompt = prompt or ()
        text_prefix = spans.first // block_size * block_size
        keeps_turns = schedule.history == "keep"
        if keeps_turns:
            (_, end, size), *later = cut_at_markers(spans, prompt, schedule.marker)
            cut = [(text_prefix, end, size), *later]
            turns = tuple(Turn(*turn, _kept(schedule, turn[-1:])) for turn in cut)
        else:
            kept = _kept(schedule, spans.sizes)
            turns = (Turn(text_prefix, len(prompt), spans.num_visual, kept),)
        return cls(
            spans=spans,
            prompt=prompt,
            turns=Turns(turns),
            keep=schedule.keep,
            text_prefix=text_prefix,
            dense_stages=int(schedule.encoder_ratio is None),
            keeps_turns=keeps_turns,
            explain=options is not None and options.explain,
        )

    @property
    def num_prompt(self) -> int:
        """Prompt tokens, placeholders included."""
        return len(self.prompt)

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """[stages]: visual tokens that run there, of all turns."""
        return tuple(map(sum, zip(*(turn.kept for turn in self.turns.turns), strict=True)))

    @cached_property
    def deferred(self) -> np.ndarray:
        """[stages] int64: visual tokens that do NOT run there."""
        return self.spans.num_visual - np.array(self.kept, dtype=np.int64)

    def seed(self, turn: Turn) -> int:
        """A number that depends on the prompt up to a turn's end alone, so that chance falls the
        same way again."""
        return zlib.crc32(np.asarray(self.prompt[: turn.end], dtype=np.int64).tobytes())

    def kv_length(self, stage: int, num_computed: int) -> int:
        """K/V entries of a stage once `num_computed` tokens have run the step they were given."""
        if stage < self.dense_stages:
            return num_computed
        return self.turns.length(stage, num_computed)


@lru_cache(maxsize=4096)
def _kept(schedule: RoutingSchedule, image_sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(schedule.kept_per_stage(*image_sizes))
