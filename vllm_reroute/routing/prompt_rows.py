"""Index tensors over the image prompts of a step, in the token layout a decision sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_reroute.plan.step_plan import RequestRouting, StepPlan
from vllm_reroute.to_device import to_device


@dataclass(frozen=True)
class PromptRows:
    """Image prompts in a token layout: that of the whole step, or of the stage before.

    rows: [P] int64, the layout's rows of all prompt tokens, request by request.
    slots: [P] int64, the same tokens in a padded [requests, width] table, flattened.
    last: [requests] int64, the layout's row of each last prompt token, which scores.
    lens, num_visual: prompt tokens and visual tokens present per request. num_rows: rows of the
    layout. requests: whose prompts these are.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    last: torch.Tensor
    lens: tuple[int, ...]
    num_visual: tuple[int, ...]
    num_rows: int
    requests: tuple[RequestRouting, ...]

    @property
    def width(self) -> int:
        return max(self.lens)

    @property
    def are_all_rows(self) -> bool:
        """Whether the layout holds nothing but these prompts: `rows` then counts from 0 up."""
        return sum(self.lens) == self.num_rows

    @classmethod
    def of(cls, plan: StepPlan, keep_ratio: float | None, device: torch.device) -> PromptRows:
        """Prompts as laid out in a stage of `keep_ratio`; None: all tokens of the step."""
        if keep_ratio is None:
            lengths = plan.everyone
            num_visual = tuple(p.routing.spans.num_visual for p in plan.prefills)
        else:
            lengths, ratio_index = plan.lengths[keep_ratio], plan.ratio_index(keep_ratio)
            num_visual = tuple(p.routing.num_kept(ratio_index) for p in plan.prefills)
        lens = tuple(
            p.routing.num_prompt - p.routing.spans.num_visual + n
            for p, n in zip(plan.prefills, num_visual, strict=True)
        )
        starts = [int(lengths.query_start_loc[p.index]) for p in plan.prefills]
        width = max(lens)
        rows = [np.arange(start, start + n) for start, n in zip(starts, lens, strict=True)]
        slots = [np.arange(i * width, i * width + n) for i, n in enumerate(lens)]
        last = [start + n - 1 for start, n in zip(starts, lens, strict=True)]
        packed = np.concatenate((*rows, *slots, last)).astype(np.int64)
        tensor = to_device(packed, device)
        total = sum(lens)
        return cls(
            rows=tensor[:total],
            slots=tensor[total : 2 * total],
            last=tensor[2 * total :],
            lens=lens,
            num_visual=num_visual,
            num_rows=lengths.num_tokens,
            requests=tuple(p.routing for p in plan.prefills),
        )


def prompt_scores(of_tokens: torch.Tensor, prompts: PromptRows) -> torch.Tensor:
    """Scores [requests, width] from one per row of the layout: what a scorer would return."""
    scores = of_tokens.new_zeros(len(prompts.lens) * prompts.width)
    scores[prompts.slots] = of_tokens[prompts.rows]
    return scores.view(len(prompts.lens), prompts.width)


def visual_mask(plan: StepPlan, device: torch.device) -> torch.Tensor:
    """bool [tokens]: the visual tokens routed in this step."""
    mask = np.zeros(plan.num_tokens, dtype=bool)
    for prefill in plan.prefills:
        prompt = slice(prefill.start, prefill.start + prefill.num_tokens)
        mask[prompt] = prefill.routing.spans.mask(prefill.num_tokens)
    return to_device(mask, device)
