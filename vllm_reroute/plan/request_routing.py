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

from vllm_reroute.plan.chunks import LAST_TOKENS
from vllm_reroute.plan.turns import Cut, Turn, Turns, cut_at_markers
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.schedule import RoutingSchedule
from vllm_reroute.schedule.recall import RecallCounts
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
    keeps_turns: whether what finished turns have kept stays, see `Turns`. recalls: whether later
    turns bring back what earlier ones have deferred.
    explain: what it wants to be told of its decisions, see `Explain`.
    """

    spans: VisualSpans
    prompt: Sequence[int]
    turns: Turns
    keep: tuple[float, ...]
    text_prefix: int
    dense_stages: int
    keeps_turns: bool
    recalls: bool
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
        if schedule.keeps_turns:
            first, *later = cut_at_markers(spans, prompt, schedule.marker)
            cut = [replace(first, first=text_prefix), *later]
            turns = _turns(schedule, cut)
        else:
            kept = _kept(schedule, spans.sizes)
            turns = (Turn(text_prefix, len(prompt), spans.num_visual, kept, spans.end),)
        return cls(
            spans=spans,
            prompt=prompt,
            turns=Turns(turns),
            keep=schedule.keep,
            text_prefix=text_prefix,
            dense_stages=int(schedule.encoder_ratio is None),
            keeps_turns=schedule.keeps_turns,
            recalls=schedule.recalls,
            explain=options is not None and options.explain,
        )

    @property
    def num_prompt(self) -> int:
        """Prompt tokens, placeholders included."""
        return len(self.prompt)

    @cached_property
    def settled(self) -> int:
        """Tokens after which all is decided: what is not deferred runs in all stages from there on."""
        return self.turns.turns[-1].end

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """[stages]: visual tokens that run there, of all turns."""
        return tuple(map(sum, zip(*(turn.kept for turn in self.turns.turns), strict=True)))

    @cached_property
    def deferred(self) -> tuple[int, ...]:
        """[stages]: visual tokens that do NOT run there."""
        return tuple(self.spans.num_visual - kept for kept in self.kept)

    @cached_property
    def awaited(self) -> tuple[Turn, ...]:
        """Turns whose visual tokens a later turn of this prompt may bring back."""
        last = self.turns.last_recall()
        return tuple(turn for turn in self.turns.with_pictures() if turn.end < last)

    def left_in_pages(self, turn: Turn, block_size: int, *, offered: bool) -> range:
        """Blocks of tokens whose parked states are worth keeping once a turn has been decided.

        offered: whether the prefix cache is on. Later prompts that begin alike find those of the first
        turn; where turns bring tokens back, later turns of this prompt and of others those of any.
        """
        if turn in self.awaited or (offered and self.recalls and not turn.recalls):
            return turn.reusable(block_size)
        if offered and turn == self.turns.turns[0]:
            return range(turn.begin // block_size, turn.end // block_size)
        return range(0)

    def awaits(self, num_tokens: int) -> bool:
        """Whether a turn still to be decided after `num_tokens` tokens may bring tokens back."""
        return num_tokens < self.turns.last_recall()

    @cached_property
    def visual_positions(self) -> np.ndarray:
        """[visual tokens] int64: prompt positions."""
        return self.spans.mask(self.spans.end).nonzero()[0]

    def seed(self, turn: Turn) -> int:
        """A number that depends on the prompt up to a turn's end alone, so that chance falls the
        same way again."""
        return zlib.crc32(np.asarray(self.prompt[: turn.end], dtype=np.int64).tobytes())

    def kv_length(self, stage: int, num_computed: int) -> int:
        """K/V entries of a stage once `num_computed` tokens have run the step they were given."""
        if stage < self.dense_stages:
            return num_computed
        if num_computed >= self.settled:
            return num_computed - self.deferred[stage]
        return self.turns.length(stage, num_computed)


@lru_cache(maxsize=4096)
def _kept(schedule: RoutingSchedule, image_sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(schedule.kept_per_stage(*image_sizes))


def _turns(schedule: RoutingSchedule, cut: Sequence[Cut]) -> tuple[Turn, ...]:
    """What each of a prompt's turns decides; those that decide nothing are left out."""
    if not schedule.recalls:
        with_pictures = (one for one in cut if one.size)
        return tuple(
            Turn(one.first, one.end, one.size, _kept(schedule, (one.size,)), one.visual_end)
            for one in with_pictures
        )
    counts = RecallCounts(lambda size: _kept(schedule, (size,)))
    turns: list[Turn] = []
    for one in cut:
        if one.size:
            kept = counts.picture(one.size)
            turns.append(Turn(one.first, one.end, one.size, kept, one.visual_end))
            continue
        begin = max(min(one.first, one.end - LAST_TOKENS), turns[-1].end)
        if one.end - begin >= LAST_TOKENS and any(brought := counts.question()):
            turns.append(Turn(begin, one.end, counts.num_visual, brought, visual_end=0))
    return tuple(turns)
