"""Which visual tokens a stage holds: a number beside every K/V entry, since keys have lost what they were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_reroute.plan.step_plan import Places, StepPlan
from vllm_reroute.to_device import to_device

if TYPE_CHECKING:
    from vllm_reroute.attention.layer import RoutedAttention

TEXT = -(2**30)
"""The number of what is no visual token."""


class HeldTokens:
    """Numbers of visual tokens in their prompt, from 0 up, by the slot of a stage's first layer.

    Steps that decide write them, for all rows that they run behind the decision. So they are right
    wherever a turn has been decided; elsewhere a stage holds nothing but text, whose slots may keep
    what they had before. Blocks that are shared or copied take them along.

    first_layers: of all stages, in order.
    """

    def __init__(self, first_layers: Sequence[RoutedAttention]) -> None:
        self._first_layers = first_layers
        self._tables = first_layers[0].tables
        self._numbers: torch.Tensor | None = None

    def write(self, stage: int, plan: StepPlan, numbers: torch.Tensor) -> None:
        """The rows [n] that the stage is about to run are these visual tokens, or `TEXT`. numbers: int32."""
        tables, rows = self._tables, plan.stages[stage]
        if rows.num_tokens <= tables.max_tokens:
            slots = tables.slots_in_step(stage, rows.num_tokens)
        else:
            request, position = (part.astype(np.int64) for part in rows.request_and_position)
            slots = tables.slots_of(stage, Places(request, position), layer=0)[0]
        self._all()[slots] = numbers

    def among(
        self, stage: int, entries: Places, first: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        """bool `shape`, [requests, width]: places in a table of prompts whose token the stage holds.

        entries: n entries of the stage's K/V, of turns that have been decided. first: [n] int64, where
        the table, laid out row behind row, has the first visual token of that entry's prompt.
        """
        slots = self._tables.slots_of(stage, entries, layer=0)[0]
        # Text goes to one place more, in front.
        places = (self._all()[slots] + first).clamp(min=-1) + 1
        count, width = shape
        held = torch.zeros(1 + count * width, dtype=torch.bool, device=places.device)
        return held.index_fill_(0, places, True)[1:].view(count, width)

    def copy(self, blocks: Iterable[tuple[int, int]]) -> None:
        """Before a step: (block, its copy), of the pool."""
        pairs = np.array(list(blocks), dtype=np.int64)
        source, copies = to_device(pairs, self._all().device).unbind(1)
        by_block = self._all().view(-1, self._tables.block_size)
        by_block[copies] = by_block[source]

    def _all(self) -> torch.Tensor:
        """[slots of the pool] int32; as large as the pool, which is there when it is first needed."""
        if self._numbers is None:
            cache = self._first_layers[0].kv_cache
            slots = len(cache) * self._tables.block_size
            # Made in inference mode or not, and written in both.
            with torch.inference_mode(False):
                self._numbers = torch.full((slots,), TEXT, dtype=torch.int32, device=cache.device)
        return self._numbers


def numbers_of(plan: StepPlan, device: torch.device) -> torch.Tensor:
    """int32 [candidates]: numbers of the visual tokens decided about in this step, `TEXT` of all others."""
    numbers = np.full(plan.candidates.num_tokens, TEXT, dtype=np.int32)
    for prefill in plan.prefills:
        own = numbers[prefill.start : prefill.start + prefill.num_tokens]
        first = 0 if prefill.turn.recalls else prefill.routing.spans.num_before(prefill.first)
        own[prefill.ranked] = first + np.arange(prefill.turn.size)
    return to_device(numbers, device)
