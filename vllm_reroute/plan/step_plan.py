"""The plan of one engine step: lengths per keep ratio, and the image prefills to route."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.schedule.budget import num_kept_of_images


@dataclass(frozen=True)
class RequestRouting:
    """What stays the same for one image request over its whole life.

    spans: its visual tokens. prompt: its token ids; the last one scores.
    deferred: [ratios] int64, visual tokens NOT kept, in the order of the schedule's ratios.
    """

    spans: VisualSpans
    prompt: Sequence[int]
    deferred: np.ndarray

    @classmethod
    def of(
        cls,
        spans: VisualSpans | None,
        prompt: Sequence[int],
        ratios: Sequence[float],
        encoder_ratio: float | None = None,
    ) -> RequestRouting | None:
        """None for a request without visual tokens.

        ratios, encoder_ratio: of the `RoutingSchedule`.
        """
        if spans is None:
            return None
        kept = [num_kept_of_images(spans.sizes, ratio, encoder_ratio) for ratio in ratios]
        return cls(spans, prompt, spans.num_visual - np.array(kept, dtype=np.int64))

    @property
    def num_prompt(self) -> int:
        """Prompt tokens, placeholders included."""
        return len(self.prompt)

    @cached_property
    def seed(self) -> int:
        """A number that depends on the prompt alone, so that chance falls the same way again."""
        return zlib.crc32(np.asarray(self.prompt, dtype=np.int64).tobytes())

    def num_kept(self, ratio_index: int) -> int:
        """Visual tokens that run in stages of the ratio at `ratio_index`."""
        return self.spans.num_visual - int(self.deferred[ratio_index])


@dataclass(frozen=True)
class StageLengths:
    """Lengths all stages of one keep ratio see in this step.

    query_lens: [requests] int32, tokens that run. seq_lens: [requests] int32, K/V entries held
    once the step has written its own.
    """

    query_lens: np.ndarray
    seq_lens: np.ndarray

    @cached_property
    def query_start_loc(self) -> np.ndarray:
        """[requests + 1] int32."""
        starts = np.zeros(len(self.query_lens) + 1, dtype=np.int32)
        np.cumsum(self.query_lens, out=starts[1:])
        return starts

    @property
    def num_tokens(self) -> int:
        return int(self.query_start_loc[-1])

    def request_and_position(self) -> tuple[np.ndarray, np.ndarray]:
        """[tokens] each, for the tokens that run: their request, and their place in its K/V.

        Every request runs at least one token: all of its text, and a kept visual token.
        """
        requests = np.arange(len(self.query_lens), dtype=np.int32)
        if self.num_tokens == len(requests):
            return requests, self.seq_lens - 1
        request = requests.repeat(self.query_lens)
        shift = self.seq_lens - self.query_start_loc[1:]
        return request, np.arange(self.num_tokens, dtype=np.int32) + shift[request]


@dataclass(frozen=True)
class ImagePrefill:
    """One request whose visual tokens are routed in this step.

    index: its row in the step's batch. start: its first token in the step's flat token axis.
    num_tokens: its tokens in this step. routing: its lasting facts.
    """

    index: int
    start: int
    num_tokens: int
    routing: RequestRouting


@dataclass(frozen=True)
class StepPlan:
    """One step, complete before it runs. Everything here lives on the host.

    lengths: keep ratio -> `StageLengths`. prefills: empty in a step that only decodes or runs
    text; the model is then an ordinary loop over its layers. everyone: lengths with no token
    deferred, the layout of the step before any decision.
    """

    num_reqs: int
    num_tokens: int
    lengths: Mapping[float, StageLengths]
    prefills: tuple[ImagePrefill, ...]
    everyone: StageLengths

    def ratio_index(self, ratio: float) -> int:
        """Place of a keep ratio among those of the schedule."""
        return list(self.lengths).index(ratio)


def plan_step(
    num_computed: np.ndarray,
    num_scheduled: np.ndarray,
    routings: Sequence[RequestRouting | None],
    ratios: Sequence[float],
) -> StepPlan:
    """Plan a step from the batch's token counts.

    num_computed, num_scheduled: [requests], tokens computed before and scheduled now.
    routings: one per request, None for text-only ones. ratios: `RoutingSchedule.ratios`.

    An image prompt is scheduled whole (see `kv_cache/scheduler.py`), so a step runs either all
    visual tokens of a request or none of them.
    """
    num_reqs = len(routings)
    seq_lens = num_computed + num_scheduled
    starts = np.concatenate(([0], np.cumsum(num_scheduled)))
    held = np.zeros((num_reqs, len(ratios)), dtype=np.int64)
    skipped = np.zeros_like(held)
    prefills = []
    for i, routing in enumerate(routings):
        if routing is None or seq_lens[i] <= routing.spans.first:
            continue
        held[i] = routing.deferred
        if num_computed[i] < routing.spans.end:
            assert num_computed[i] == 0 and seq_lens[i] >= routing.num_prompt, (
                "an image prompt was not scheduled whole"
            )
            skipped[i] = routing.deferred
            prefills.append(ImagePrefill(i, int(starts[i]), int(num_scheduled[i]), routing))
    query_lens = (num_scheduled - skipped.T).astype(np.int32)
    kv_lens = (seq_lens - held.T).astype(np.int32)
    lengths = {
        ratio: StageLengths(query_lens=query, seq_lens=kv)
        for ratio, query, kv in zip(ratios, query_lens, kv_lens, strict=True)
    }
    everyone = StageLengths(num_scheduled.astype(np.int32), seq_lens.astype(np.int32))
    return StepPlan(num_reqs, int(starts[-1]), lengths, tuple(prefills), everyone)
