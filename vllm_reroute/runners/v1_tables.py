"""The V1 runner's block tables, of which nothing is computed that routing does not read.

vLLM works out slots per group in every step, and copies every table to the device. Routed layers have
slots of their own, and on CPU they can read blocks where the runner has put them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.worker.block_table import BlockTable, SlotMappingMode

from vllm_reroute.kv_cache import interleaving

if TYPE_CHECKING:
    from vllm_reroute.attention.step_tables import StepTables


def take_over(tables: Sequence[BlockTable], stages: Sequence[int], own: StepTables) -> None:
    """Stop what nobody reads; on CPU, let blocks be put into `own` as they arrive.

    tables: one per K/V group, maybe with requests in them. stages: the group of each stage.
    """
    for table in tables:
        table.slot_mapping_mode = SlotMappingMode.NONE
    if own.kernel is None:
        for table in tables:
            slots: Any = NoSlots()
            table.slot_mapping = slots
        for stage, group in enumerate(stages):
            DealtBlockTable.adopt(tables[group], own.of_stage(stage))


class NoSlots:
    """Stands for a table's slots, of which vLLM cuts and pads a piece in every step: nobody reads it."""

    @property
    def gpu(self) -> NoSlots:
        return self

    def __getitem__(self, piece: Any) -> NoSlots:
        return self

    def fill_(self, value: int) -> None:
        pass


class DealtBlockTable(BlockTable):
    """A stage's table on CPU: blocks of requests are dealt out to its layers when they arrive.

    block_table: [layers, requests, blocks] int32, the very memory that the layers read.
    """

    @classmethod
    def adopt(cls, table: BlockTable, rows: torch.Tensor) -> None:
        """Turn a table vLLM has made into one that keeps its blocks in `rows`, in place."""
        held = table.get_numpy_array()
        num_layers, _, max_blocks = rows.shape
        count = min(max_blocks, held.shape[1] // num_layers)
        rows[:, : len(held), :count].numpy()[:] = interleaving.dealt(held, num_layers, count)
        table.__class__ = cls
        buffer: Any = SimpleNamespace(gpu=rows, cpu=rows, np=rows.numpy())
        table.block_table = buffer

    def append_row(self, block_ids: list[int], row_idx: int) -> None:
        if not block_ids:
            return
        rows = self.block_table.np
        new = np.array(block_ids, dtype=np.int32).reshape(-1, len(rows)).T
        start = self._num_blocks(row_idx)
        self.num_blocks_per_row[row_idx] += len(block_ids)
        rows[:, row_idx, start : start + new.shape[1]] = new

    def clear_row(self, row_idx: int) -> None:
        self.block_table.np[:, row_idx, : self._num_blocks(row_idx)] = 0
        self.num_blocks_per_row[row_idx] = 0

    def move_row(self, src: int, tgt: int) -> None:
        rows, count = self.block_table.np, self._num_blocks(src)
        rows[:, tgt, :count] = rows[:, src, :count]
        rows[:, src, :count] = 0
        self.num_blocks_per_row[tgt] = self.num_blocks_per_row[src]
        self.num_blocks_per_row[src] = 0

    def swap_row(self, src: int, tgt: int) -> None:
        rows, counts = self.block_table.np, self.num_blocks_per_row
        rows[:, [src, tgt]] = rows[:, [tgt, src]]
        counts[[src, tgt]] = counts[[tgt, src]]

    def commit_block_table(self, num_reqs: int) -> None:
        """The device is the host."""

    def get_device_tensor(self, num_reqs: int) -> torch.Tensor:
        """The first layer's."""
        return self.block_table.gpu[0, :num_reqs]

    def _num_blocks(self, row_idx: int) -> int:
        """Of each layer."""
        return self.num_blocks_per_row[row_idx] // len(self.block_table.np)
