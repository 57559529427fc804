"""Index tensors over the image prompts a step decides about, in the token layout a decision sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.step_plan import ImagePrefill, Places, StageLengths, StepPlan
from vllm_reroute.to_device import to_device


@dataclass(frozen=True)
class PromptRows:
    """Prompts in a token layout: that of the candidates, or of the stage before.

    A prompt's text before its first candidate is in the stages' K/V already: *cached*. A decision
    looks at all tokens that are present, cached ones first, as a padded table [requests, width].

    rows: [P] int64, the layout's rows of the prompts' tokens, request by request.
    slots: [P] int64, their places in the table, flattened. last: [requests] int64, the layout's row
    of each last prompt token, which scores. lens: [requests], tokens present per prompt.
    num_cached: [requests], of them cached. num_visual: visual tokens present per prompt.
    num_rows: rows of the layout. requests: whose prompts these are.
    shared_rows: [s] int64, the layout's rows of text that becomes shareable in this step, at the
    K/V places `shared`; empty where no prompt has cached text.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    last: torch.Tensor
    lens: tuple[int, ...]
    num_cached: tuple[int, ...]
    num_visual: tuple[int, ...]
    num_rows: int
    requests: tuple[RequestRouting, ...]
    batch_rows: tuple[int, ...]
    shared_rows: torch.Tensor
    shared: Places

    @property
    def width(self) -> int:
        return max(self.lens)

    @property
    def are_all_rows(self) -> bool:
        """Whether the layout holds nothing but these prompts: `rows` then counts from 0 up."""
        return sum(self.lens) - sum(self.num_cached) == self.num_rows

    @cached_property
    def cached(self) -> Places:
        """The cached tokens, by their places in the K/V of every stage."""
        counts = np.array(self.num_cached, dtype=np.int64)
        request = np.array(self.batch_rows, dtype=np.int64).repeat(counts)
        return Places(request, _ranges(np.zeros_like(counts), counts))

    @cached_property
    def cached_slots(self) -> np.ndarray:
        """[cached] int64: places of the cached tokens in the table, flattened."""
        counts = np.array(self.num_cached, dtype=np.int64)
        return _ranges(np.arange(len(counts)) * self.width, counts)

    @classmethod
    def of(cls, plan: StepPlan, stage: int | None, device: torch.device) -> PromptRows:
        """Prompts as laid out in a stage; None: as candidates of the first decision."""
        prefills = plan.prefills
        lengths = plan.candidates if stage is None else plan.stages[stage]
        num_visual = [
            p.routing.spans.num_visual if stage is None else p.routing.kept[stage] for p in prefills
        ]
        cached = np.array([p.first for p in prefills], dtype=np.int64)
        own = np.array(
            [
                p.num_prompt_rows - p.routing.spans.num_visual + n
                for p, n in zip(prefills, num_visual, strict=True)
            ],
            dtype=np.int64,
        )
        starts = np.array([lengths.query_start_loc[p.index] for p in prefills], dtype=np.int64)
        lens = cached + own
        table_starts = np.arange(len(prefills)) * int(lens.max()) + cached
        shared, shared_rows = _shared_text(plan, lengths, prefills)
        packed = (_ranges(starts, own), _ranges(table_starts, own), starts + own - 1, shared_rows)
        rows, slots, last, shared_rows = to_device(np.concatenate(packed), device).split(
            [len(part) for part in packed]
        )
        return cls(
            rows=rows,
            slots=slots,
            last=last,
            lens=tuple(lens.tolist()),
            num_cached=tuple(cached.tolist()),
            num_visual=tuple(num_visual),
            num_rows=lengths.num_tokens,
            requests=tuple(p.routing for p in prefills),
            batch_rows=tuple(p.index for p in prefills),
            shared_rows=shared_rows,
            shared=shared,
        )


def prompt_scores(of_tokens: torch.Tensor, prompts: PromptRows) -> torch.Tensor:
    """Scores [requests, width] from one per row of the layout: what a scorer would return."""
    scores = of_tokens.new_zeros(len(prompts.lens) * prompts.width)
    scores[prompts.slots] = of_tokens[prompts.rows]
    return scores.view(len(prompts.lens), prompts.width)


def visual_mask(plan: StepPlan, device: torch.device) -> torch.Tensor:
    """bool [candidates]: the visual tokens decided about in this step."""
    mask = np.zeros(plan.candidates.num_tokens, dtype=bool)
    for prefill in plan.prefills:
        end = prefill.first + prefill.num_tokens
        own = prefill.routing.spans.mask(end)[prefill.first :]
        mask[prefill.start : prefill.start + prefill.num_tokens] = own
    return to_device(mask, device)


def _shared_text(
    plan: StepPlan, lengths: StageLengths, prefills: tuple[ImagePrefill, ...]
) -> tuple[Places, np.ndarray]:
    """Text that a prompt of this step may find cached though it is written in this very step.

    Its rows lead those of its request in every layout, so a row is its distance from the first.
    """
    assert plan.boundary is not None
    shared = plan.boundary.shared_text
    if not any(p.first for p in prefills):
        return shared.take(np.zeros(0, dtype=np.int64)), np.zeros(0, dtype=np.int64)
    rows = (
        lengths.query_start_loc[shared.request]
        + shared.position
        - plan.boundary.first[shared.request]
    )
    return shared, rows.astype(np.int64)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers start, start + 1, … of each range, one range after the other, int64."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) + (starts - ends + counts).repeat(counts)
