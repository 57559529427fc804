"""Attention metadata of a keep ratio, and the buffers it lives in."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_reroute.planning.step_plan import StageLengths, StepPlan
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


def per_layer_metadata(shared: Any, buffers: GroupBuffers, num_reqs: int, num_tokens: int) -> Any:
    """One copy of the backend's metadata per layer, each with the layer's own blocks and slots."""
    layers = []
    block_tables = buffers.block_tables[:, :num_reqs].unbind()
    slot_mappings = buffers.slot_mappings[:, :num_tokens].unbind()
    for blocks, slots in zip(block_tables, slot_mappings, strict=True):
        metadata = copy(shared)
        metadata.block_table, metadata.slot_mapping = blocks, slots
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

    def fill(
        self, common: CommonAttentionMetadata, lengths: StageLengths | None
    ) -> CommonAttentionMetadata:
        """Write this step's values; return the common metadata of the group's stages.

        common: the runner's metadata over all tokens, its block table holding the group's
        interleaved blocks. lengths: this ratio's lengths, None in a dummy run.
        """
        return self._fill_dense(common) if lengths is None else self._fill_compact(common, lengths)

    def _fill_dense(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """A dummy run attends to whatever is there, and writes nowhere."""
        num_reqs, num_tokens = common.num_reqs, common.num_actual_tokens
        self.seq_lens[:num_reqs].copy_(common.seq_lens, non_blocking=True)
        self.query_start_loc[: num_reqs + 1].copy_(common.query_start_loc, non_blocking=True)
        self._deal_blocks(common.block_table_tensor, num_reqs, common.max_seq_len)
        self.slot_mappings[:, :num_tokens].fill_(PAD_SLOT_ID)
        return common.replace(**self._views(num_reqs, num_tokens))

    def _fill_compact(
        self, common: CommonAttentionMetadata, lengths: StageLengths
    ) -> CommonAttentionMetadata:
        """This ratio's lengths and slots; padded rows and tokens stay padded."""
        num_reqs, planned, running = common.num_reqs, len(lengths.seq_lens), lengths.num_tokens
        request, position = lengths.request_and_position()
        # One array, so that one copy takes it all to the device.
        host = np.zeros(2 * (num_reqs + running) + 1, dtype=np.int32)
        seq_lens, query_start_loc, entries, offsets = np.split(
            host, (num_reqs, 2 * num_reqs + 1, 2 * num_reqs + 1 + running)
        )
        seq_lens[:planned] = lengths.seq_lens
        query_start_loc[: planned + 1] = lengths.query_start_loc
        query_start_loc[planned + 1 :] = running
        np.divmod(position, self.block_size, out=(entries, offsets))
        entries += request * self.block_tables.shape[2]
        packed = to_device(host, self.device)
        self.seq_lens[:num_reqs].copy_(packed[:num_reqs])
        self.query_start_loc[: num_reqs + 1].copy_(packed[num_reqs : 2 * num_reqs + 1])
        max_seq_len = int(lengths.seq_lens.max())
        self._deal_blocks(common.block_table_tensor, num_reqs, max_seq_len)
        num_tokens = common.num_actual_tokens - int(common.query_start_loc_cpu[planned]) + running
        self._fill_slots(*packed[2 * num_reqs + 1 :].view(2, running), num_tokens)
        return common.replace(
            **self._views(num_reqs, num_tokens),
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens),
            query_start_loc_cpu=torch.from_numpy(query_start_loc),
            num_actual_tokens=num_tokens,
            max_query_len=int(lengths.query_lens.max()),
            max_seq_len=max_seq_len,
            positions=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )

    def _views(self, num_reqs: int, num_tokens: int) -> dict[str, torch.Tensor]:
        return {
            "seq_lens": self.seq_lens[:num_reqs],
            "query_start_loc": self.query_start_loc[: num_reqs + 1],
            "block_table_tensor": self.block_tables[0, :num_reqs],
            "slot_mapping": self.slot_mappings[0, :num_tokens],
        }

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
        blocks = self.block_tables.flatten(1)[:, entries]
        torch.add(offsets, blocks, alpha=self.block_size, out=self.slot_mappings[:, :running])
        if running < num_tokens:
            self.slot_mappings[:, running:num_tokens].fill_(PAD_SLOT_ID)
