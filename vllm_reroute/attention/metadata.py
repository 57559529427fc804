"""Attention metadata of a keep ratio, and the buffers it lives in."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_reroute.plan.step_plan import StageLengths, StepPlan
from vllm_reroute.to_device import to_device


@dataclass(frozen=True)
class RoutedAttentionMetadata:
    """What the attention layers of one keep ratio read in a step.

    plan: the step's plan; None in a dummy run, where nothing is routed.
    layers: the backend's own metadata per layer of the group. They share everything but
    `block_table` and `slot_mapping`.
    """

    plan: StepPlan | None
    layers: tuple[Any, ...]


@dataclass(frozen=True)
class StepViews:
    """The rows of a group's buffers that a step of some size uses; block tables and slots per layer."""

    num_reqs: int
    num_tokens: int
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    block_tables: tuple[torch.Tensor, ...]
    slot_mappings: tuple[torch.Tensor, ...]


def per_layer_metadata(shared: Any, views: StepViews) -> tuple[Any, ...]:
    """One copy of the backend's metadata per layer, each with the layer's own blocks and slots."""
    layers = []
    for block_table, slot_mapping in zip(views.block_tables, views.slot_mappings, strict=True):
        metadata = copy(shared)
        metadata.block_table, metadata.slot_mapping = block_table, slot_mapping
        layers.append(metadata)
    return tuple(layers)


class GroupBuffers:
    """Device tensors of one keep ratio, allocated once and written in place every step.

    CUDA graphs replay with the addresses they were captured with, so nothing here moves. Rows
    beyond the batch are padding: length 0, the null block, slot `PAD_SLOT_ID`.

    block_tables: [layers, max_reqs, max_blocks] int32. slot_mappings: [layers, max_tokens] int64.
    seq_lens: [max_reqs] int32. query_start_loc: [max_reqs + 1] int32.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        block_size: int,
        max_reqs: int,
        max_tokens: int,
        max_blocks: int,
        device: torch.device,
    ) -> None:
        self.num_layers = num_layers
        self.block_size = block_size
        self.device = device
        self.block_tables = torch.zeros(
            num_layers, max_reqs, max_blocks, dtype=torch.int32, device=device
        )
        self.slot_mappings = torch.full(
            (num_layers, max_tokens), PAD_SLOT_ID, dtype=torch.int64, device=device
        )
        self.seq_lens = torch.zeros(max_reqs, dtype=torch.int32, device=device)
        self.query_start_loc = torch.zeros(max_reqs + 1, dtype=torch.int32, device=device)
        self._latest = self._sliced(0, 0)

    def fill(
        self, common: CommonAttentionMetadata, lengths: StageLengths | None
    ) -> CommonAttentionMetadata:
        """Write this step's values; return the common metadata of the group's stages.

        common: the runner's metadata over all tokens, its block table holding the group's
        interleaved blocks. lengths: this ratio's lengths, None in a dummy run.
        """
        return self._fill_dense(common) if lengths is None else self._fill_compact(common, lengths)

    def views(self, num_reqs: int, num_tokens: int) -> StepViews:
        """Views of that size; most steps have the size of the one before."""
        if (self._latest.num_reqs, self._latest.num_tokens) != (num_reqs, num_tokens):
            self._latest = self._sliced(num_reqs, num_tokens)
        return self._latest

    def _sliced(self, num_reqs: int, num_tokens: int) -> StepViews:
        return StepViews(
            num_reqs,
            num_tokens,
            self.seq_lens[:num_reqs],
            self.query_start_loc[: num_reqs + 1],
            self.block_tables[:, :num_reqs].unbind(),
            self.slot_mappings[:, :num_tokens].unbind(),
        )

    def _fill_dense(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """A dummy run attends to whatever is there, and writes nowhere."""
        views = self.views(common.num_reqs, common.num_actual_tokens)
        views.seq_lens.copy_(common.seq_lens, non_blocking=True)
        views.query_start_loc.copy_(common.query_start_loc, non_blocking=True)
        self._deal_blocks(common.block_table_tensor, common.num_reqs, common.max_seq_len)
        self.slot_mappings[:, : common.num_actual_tokens].fill_(PAD_SLOT_ID)
        return _placed(common, views)

    def _fill_compact(
        self, common: CommonAttentionMetadata, lengths: StageLengths
    ) -> CommonAttentionMetadata:
        """This ratio's lengths and slots; padded rows and tokens stay padded."""
        num_reqs, planned, running = common.num_reqs, len(lengths.seq_lens), lengths.num_tokens
        # One array, so that one copy takes it all to the device.
        host = np.zeros(2 * (num_reqs + running) + 1, dtype=np.int32)
        seq_lens, starts, tokens = (
            host[:num_reqs],
            host[num_reqs:][: num_reqs + 1],
            host[-2 * running :],
        )
        seq_lens[:planned] = lengths.seq_lens
        starts[: planned + 1] = lengths.query_start_loc
        starts[planned + 1 :] = running
        request, position = lengths.request_and_position()
        entries, offsets = tokens[:running], tokens[running:]
        np.divmod(position, self.block_size, out=(entries, offsets))
        entries += request * self.block_tables.shape[2]
        packed = to_device(host, self.device)

        skipped = int(common.query_start_loc_cpu[planned]) - running
        views = self.views(num_reqs, common.num_actual_tokens - skipped)
        views.seq_lens.copy_(packed[:num_reqs])
        views.query_start_loc.copy_(packed[num_reqs : 2 * num_reqs + 1])
        max_seq_len = int(lengths.seq_lens.max())
        self._deal_blocks(common.block_table_tensor, num_reqs, max_seq_len)
        self._fill_slots(packed[-2 * running : -running], packed[-running:], views.num_tokens)

        compact = _placed(common, views)
        compact.seq_lens_cpu_upper_bound = torch.from_numpy(seq_lens)
        compact.query_start_loc_cpu = torch.from_numpy(starts)
        compact.num_actual_tokens = views.num_tokens
        compact.max_query_len = int(lengths.query_lens.max())
        compact.max_seq_len = max_seq_len
        compact.positions = None
        compact._num_computed_tokens_cache = None
        compact._token_to_req_indices_cache = None
        return compact

    def _deal_blocks(self, interleaved: torch.Tensor, num_reqs: int, max_seq_len: int) -> None:
        """Deal the group's block ids out to its layers, as far as this step reaches."""
        blocks = min(-(-max_seq_len // self.block_size), self.block_tables.shape[2])
        dealt = interleaved[:, : blocks * self.num_layers].unflatten(1, (blocks, self.num_layers))
        self.block_tables[:, :num_reqs, :blocks].copy_(dealt.permute(2, 0, 1))

    def _fill_slots(self, entries: torch.Tensor, offsets: torch.Tensor, num_tokens: int) -> None:
        """Slot of every token of the step in every layer, after the block tables are written.

        entries: [running] places in a layer's flattened block table. offsets: [running], within
        the block. Tokens from `running` to `num_tokens` are padding.
        """
        running = len(entries)
        blocks = self.block_tables.flatten(1).index_select(1, entries)
        torch.add(offsets, blocks, alpha=self.block_size, out=self.slot_mappings[:, :running])
        if running < num_tokens:
            self.slot_mappings[:, running:num_tokens].fill_(PAD_SLOT_ID)


def _placed(common: CommonAttentionMetadata, views: StepViews) -> CommonAttentionMetadata:
    """A copy that reads the group's buffers, the first layer's blocks and slots among them."""
    placed = copy(common)
    placed.seq_lens, placed.query_start_loc = views.seq_lens, views.query_start_loc
    placed.block_table_tensor = views.block_tables[0]
    placed.slot_mapping = views.slot_mappings[0]
    return placed
