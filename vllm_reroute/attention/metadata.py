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
    for layer in range(buffers.num_layers):
        metadata = copy(shared)
        metadata.block_table = buffers.block_tables[layer, :num_reqs]
        metadata.slot_mapping = buffers.slot_mappings[layer, :num_tokens]
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
        compact = self._dense(common) if lengths is None else self._compact(common, lengths)
        self._fill_block_tables(common.block_table_tensor, compact)
        self._fill_slots(compact)
        return compact.replace(
            block_table_tensor=self.block_tables[0, : compact.num_reqs],
            slot_mapping=self.slot_mappings[0, : compact.num_actual_tokens],
        )

    def _dense(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        self.seq_lens[: common.num_reqs].copy_(common.seq_lens, non_blocking=True)
        self.query_start_loc[: common.num_reqs + 1].copy_(common.query_start_loc, non_blocking=True)
        return common.replace(
            seq_lens=self.seq_lens[: common.num_reqs],
            query_start_loc=self.query_start_loc[: common.num_reqs + 1],
        )

    def _compact(
        self, common: CommonAttentionMetadata, lengths: StageLengths
    ) -> CommonAttentionMetadata:
        """The common metadata with this ratio's lengths; padded rows and tokens stay padded."""
        num_reqs, planned = common.num_reqs, len(lengths.seq_lens)
        padding = num_reqs - planned
        seq_lens = np.pad(lengths.seq_lens, (0, padding))
        query_start_loc = np.pad(lengths.query_start_loc, (0, padding), mode="edge")
        host = torch.from_numpy(np.concatenate((seq_lens, query_start_loc)))
        if self.device.type != "cpu":
            host = host.pin_memory()
        packed = host.to(self.device, non_blocking=True)
        self.seq_lens[:num_reqs].copy_(packed[:num_reqs])
        self.query_start_loc[: num_reqs + 1].copy_(packed[num_reqs:])
        skipped = int(common.query_start_loc_cpu[planned]) - lengths.num_tokens
        return common.replace(
            seq_lens=self.seq_lens[:num_reqs],
            seq_lens_cpu_upper_bound=host[:num_reqs],
            query_start_loc=self.query_start_loc[: num_reqs + 1],
            query_start_loc_cpu=host[num_reqs:],
            num_actual_tokens=common.num_actual_tokens - skipped,
            max_query_len=int(lengths.query_lens.max()),
            max_seq_len=int(lengths.seq_lens.max()),
            positions=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )

    def _fill_block_tables(
        self, interleaved: torch.Tensor, compact: CommonAttentionMetadata
    ) -> None:
        """Deal the group's block ids out to its layers, as far as this step reaches."""
        blocks = min(-(-compact.max_seq_len // self.block_size), self.block_tables.shape[2])
        dealt = interleaved[:, : blocks * self.num_layers].unflatten(1, (blocks, self.num_layers))
        self.block_tables[:, : compact.num_reqs, :blocks].copy_(dealt.permute(2, 0, 1))

    def _fill_slots(self, compact: CommonAttentionMetadata) -> None:
        """Slot of every token of the step in every layer: the next free ones of its request."""
        num_tokens = compact.num_actual_tokens
        starts = compact.query_start_loc
        token = torch.arange(num_tokens, device=self.device)
        request = torch.searchsorted(starts[1:], token, right=True)
        padded = request >= compact.num_reqs
        request = request.clamp_(max=compact.num_reqs - 1)
        position = token - starts[request + 1] + compact.seq_lens[request]
        # Padding that follows a request of full length would look past the end of its row.
        position.masked_fill_(padded, 0)
        block = self.block_tables[:, request, position.clamp(min=0) // self.block_size].long()
        slots = block * self.block_size + position % self.block_size
        self.slot_mappings[:, :num_tokens].copy_(slots.masked_fill_(padded, PAD_SLOT_ID))
