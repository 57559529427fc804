"""Fills what all stages read in a step by host code, where the device is the host."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_reroute.kv_cache import interleaving
from vllm_reroute.plan.step_plan import StepPlan, places_of

if TYPE_CHECKING:
    from vllm_reroute.attention.step_tables import StepTables


def write_lengths(plan: StepPlan, seq_lens: np.ndarray, starts: np.ndarray) -> None:
    """All stages' lengths [stages, reqs] and query starts [stages, reqs + 1].

    Rows beyond the plan's requests are padding: length 0, starting where the last one ends.
    """
    planned = plan.num_reqs
    seq_lens[:, :planned], seq_lens[:, planned:] = plan.seq_lens, 0
    # Without a boundary, all stages run the same tokens.
    query_lens = plan.query_lens if plan.boundary is not None else plan.query_lens[:1]
    starts[:, 0] = 0
    starts[:, 1 : planned + 1] = query_lens.cumsum(axis=1, dtype=np.int32)
    starts[:, planned + 1 :] = starts[:, planned : planned + 1]


class HostFill:
    """Fills the tables it was made for, as arrays over the same memory; see `StepTables.fill`."""

    def __init__(self, tables: StepTables) -> None:
        self._tables = tables
        self._block_tables = tables.block_tables.numpy()
        self._slot_mappings = tables.slot_mappings.numpy()
        self._seq_lens = tables.seq_lens.numpy()
        self._query_start_loc = tables.query_start_loc.numpy()
        num_layers = tables.num_layers
        self._stage_of_layer = np.arange(len(num_layers)).repeat(num_layers)
        self._rows = np.arange(sum(num_layers))[:, None]

    def __call__(
        self,
        plan: StepPlan,
        interleaved: Sequence[torch.Tensor] | None,
        *,
        num_reqs: int,
        num_tokens: int,
    ) -> None:
        starts = self._query_start_loc[:, : num_reqs + 1]
        write_lengths(plan, self._seq_lens[:, :num_reqs], starts)
        if interleaved is not None:
            self._deal_blocks(interleaved, num_reqs, int(plan.seq_lens.max(initial=0)))
        self._fill_slots(plan, num_tokens)

    def _deal_blocks(
        self,
        interleaved: Sequence[torch.Tensor],
        num_reqs: int,
        max_seq_len: int,
    ) -> None:
        """Deal the stages' block ids out to all layers, as far as this step reaches."""
        blocks = min(-(-max_seq_len // self._tables.block_size), self._tables.max_blocks)
        dealt = self._block_tables[:, :num_reqs, :blocks]
        for stage, table in enumerate(interleaved):
            dealt[self._tables.layers_of(stage)] = interleaving.dealt(
                table[:num_reqs].numpy(), self._tables.num_layers[stage], blocks
            )

    def _fill_slots(self, plan: StepPlan, num_tokens: int) -> None:
        """Where each layer writes the K/V of each token. num_tokens: with padding."""
        slots = self._slot_mappings
        if plan.boundary is None:
            # All stages run the same tokens, at places of their own.
            request, position = places_of(plan.query_lens[0], plan.seq_lens)
            self._put_slots(slice(None), request, position, self._stage_of_layer)
            slots[:, plan.num_tokens : num_tokens] = PAD_SLOT_ID
            return
        # A stage of more rows runs in pieces, which bring slots of their own.
        whole = [
            s.num_tokens if s.num_tokens <= self._tables.max_tokens else 0 for s in plan.stages
        ]
        end = max(num_tokens, *whole)
        for stage, after in pairwise((*sorted(set(plan.like_stage)), len(whole))):
            layers, count = self._tables.layers_of(stage, after), whole[stage]
            if count:
                request, position = plan.stages[stage].request_and_position
                self._put_slots(layers, request, position)
            slots[layers, count:end] = PAD_SLOT_ID

    def _put_slots(
        self,
        layers: slice,
        request: np.ndarray,
        position: np.ndarray,
        stage_of_layer: np.ndarray | None = None,
    ) -> None:
        """Write these layers' slots of tokens, by their place in the layers' K/V.

        position: [tokens], or [stages, tokens] where layers are those of several stages.
        """
        entry = position // self._tables.block_size
        # Of one type with the slots: numpy is slow where it has to convert on its way.
        offset = (position - entry * self._tables.block_size).astype(np.int64)
        own = self._slot_mappings[layers, : len(request)]
        if stage_of_layer is not None:
            entry, offset = entry.take(stage_of_layer, axis=0), offset.take(stage_of_layer, axis=0)
            own[:] = self._block_tables[self._rows[layers], request, entry]
        else:
            tables = self._block_tables[layers]
            entries = request * np.int64(tables.shape[2]) + entry
            own[:] = tables.reshape(len(tables), -1).take(entries, axis=1)
        own *= self._tables.block_size
        own += offset
