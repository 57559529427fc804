"""Fills `StepTables` on GPUs: one kernel for all layers and requests of a step.

Imported only where it runs, since Triton needs a GPU (or its interpreter). Everything it writes stays
where it is, and so does what it reads in a step without image prefill: the runner's own tensors and
one of ours. So a CUDA graph may hold it. Today it runs before the graph, because FlashAttention plans
its own work from the lengths before the graph replays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_reroute.attention.host_fill import write_lengths
from vllm_reroute.plan.step_plan import StepPlan
from vllm_reroute.to_device import to_device

if TYPE_CHECKING:
    from vllm_reroute.attention.step_tables import RunnerLengths, StepTables

_TILE = 128
"""Blocks or tokens that a program handles at a time."""


@triton.jit
def fill_kernel(
    seq_lens,  # [stages or 1, reqs] int32
    seq_lens_stride,
    starts,  # [stages or 1, reqs + 1] int32
    starts_stride,
    deferred,  # [stages, reqs] int32, taken off the lengths
    deferred_stride,
    interleaved,  # [stages] addresses of the runner's block tables [reqs, entries] int32
    interleaved_strides,  # [stages] int64
    layer_facts,  # [3, layers] int32: stage, index in the stage, layers of the stage
    num_layers,
    block_tables,  # written: [layers, max_reqs, max_blocks] int32
    block_tables_stride,
    max_blocks,
    slots,  # written: [layers, max_tokens] int64
    slots_stride,
    out_seq_lens,  # written: [stages, max_reqs] int32
    out_seq_lens_stride,
    out_starts,  # written: [stages, max_reqs + 1] int32
    out_starts_stride,
    num_reqs,
    max_tokens,
    slots_end,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per layer and request, and one more per layer for padding behind its tokens."""
    layer = tl.program_id(0)
    req = tl.program_id(1)
    stage = tl.load(layer_facts + layer)
    index = tl.load(layer_facts + num_layers + layer)
    layers = tl.load(layer_facts + 2 * num_layers + layer)
    lane = tl.arange(0, TILE)
    own_slots = slots + layer.to(tl.int64) * slots_stride
    stage_starts = starts + stage * starts_stride
    total = tl.load(stage_starts + num_reqs)
    # More rows run in pieces, which bring slots of their own.
    whole = total <= max_tokens

    if req == num_reqs:
        behind = tl.where(whole, total, 0)
        for t in range(behind, slots_end, TILE):
            tl.store(own_slots + t + lane, PAD, mask=t + lane < slots_end)
        if index == 0:
            tl.store(out_starts + stage * out_starts_stride + num_reqs, total)
        return

    seq_len = tl.load(seq_lens + stage * seq_lens_stride + req)
    seq_len = seq_len - tl.load(deferred + stage * deferred_stride + req)
    start = tl.load(stage_starts + req)
    end = tl.load(stage_starts + req + 1)
    if index == 0:
        tl.store(out_seq_lens + stage * out_seq_lens_stride + req, seq_len)
        tl.store(out_starts + stage * out_starts_stride + req, start)

    table = tl.load(interleaved + stage).to(tl.pointer_type(tl.int32))
    table += req * tl.load(interleaved_strides + stage) + index
    own_blocks = block_tables + layer.to(tl.int64) * block_tables_stride + req * max_blocks
    num_blocks = (seq_len + BLOCK - 1) // BLOCK
    for b in range(0, num_blocks, TILE):
        mask = b + lane < num_blocks
        block = tl.load(table + (b + lane) * layers, mask=mask, other=0)
        tl.store(own_blocks + b + lane, block, mask=mask)

    if whole:
        first = seq_len - (end - start)
        for t in range(start, end, TILE):
            mask = t + lane < end
            position = first + t - start + lane
            block = tl.load(table + position // BLOCK * layers, mask=mask, other=0)
            slot = block.to(tl.int64) * BLOCK + position % BLOCK
            tl.store(own_slots + t + lane, slot, mask=mask)


class KernelFill:
    """Fills the tables it was made for; see `StepTables.fill`."""

    def __init__(self, tables: StepTables, kernel: Any = fill_kernel) -> None:
        """kernel: another one in tests, which interpret it."""
        self._tables, self._kernel = tables, kernel
        stages, max_reqs = tables.seq_lens.shape
        device = tables.device
        stage = np.arange(stages).repeat(tables.num_layers)
        index = np.concatenate([np.arange(n) for n in tables.num_layers])
        facts = np.stack((stage, index, np.array(tables.num_layers)[stage])).astype(np.int32)
        self._layer_facts = torch.from_numpy(facts).to(device)
        self._deferred = torch.zeros(stages, max_reqs, dtype=torch.int32, device=device)
        self._deferred_cpu = np.zeros((stages, max_reqs), dtype=np.int32)
        self._nothing = torch.zeros(max_reqs, dtype=torch.int32, device=device)
        self._sources: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self,
        plan: StepPlan,
        interleaved: Sequence[torch.Tensor],
        *,
        num_reqs: int,
        num_tokens: int,
        lengths: RunnerLengths | None,
    ) -> None:
        """lengths: the runner's, on the device; None where it has none of the padded size."""
        tables = self._tables
        if plan.boundary is None and lengths is not None:
            seq_lens, starts, strides = lengths.seq_lens, lengths.query_start_loc, (0, 0)
            deferred, deferred_stride = self._deferred_now(plan, num_reqs), self._deferred.stride(0)
        else:
            seq_lens, starts = self._planned(plan, num_reqs)
            strides = seq_lens.stride(0), starts.stride(0)
            deferred, deferred_stride = self._nothing, 0
        running = [stage.num_tokens for stage in plan.stages]
        whole = max((n for n in running if n <= tables.max_tokens), default=0)
        addresses, table_strides = self._source(interleaved)
        layers = len(tables.block_tables)
        self._kernel[(layers, num_reqs + 1)](
            seq_lens,
            strides[0],
            starts,
            strides[1],
            deferred,
            deferred_stride,
            addresses,
            table_strides,
            self._layer_facts,
            layers,
            tables.block_tables,
            tables.block_tables.stride(0),
            tables.max_blocks,
            tables.slot_mappings,
            tables.slot_mappings.stride(0),
            tables.seq_lens,
            tables.seq_lens.stride(0),
            tables.query_start_loc,
            tables.query_start_loc.stride(0),
            num_reqs,
            tables.max_tokens,
            max(whole, num_tokens),
            BLOCK=tables.block_size,
            PAD=PAD_SLOT_ID,
            TILE=_TILE,
        )

    def _deferred_now(self, plan: StepPlan, num_reqs: int) -> torch.Tensor:
        """[stages, max_reqs] int32, what stages hold less of; copied only where it has changed."""
        new = np.zeros((len(plan.stages), num_reqs), dtype=np.int32)
        new[:, : plan.num_reqs] = plan.candidates.seq_lens - plan.seq_lens
        known = self._deferred_cpu[:, :num_reqs]
        if not np.array_equal(known, new):
            known[:] = new
            self._deferred[:, :num_reqs].copy_(to_device(new, self._tables.device))
        return self._deferred

    def _planned(self, plan: StepPlan, num_reqs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths and starts of all stages, from the plan, in one copy."""
        host = np.zeros((len(plan.stages), 2 * num_reqs + 1), dtype=np.int32)
        write_lengths(plan, host[:, :num_reqs], host[:, num_reqs:])
        packed = to_device(host, self._tables.device)
        return packed[:, :num_reqs], packed[:, num_reqs:]

    def _source(self, interleaved: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Addresses and row strides of the runner's tables; they seldom move."""
        key = tuple(table.data_ptr() for table in interleaved)
        if key not in self._sources:
            strides = np.array([table.stride(0) for table in interleaved], dtype=np.int64)
            device = self._tables.device
            self._sources = {
                key: (to_device(np.array(key, dtype=np.int64), device), to_device(strides, device))
            }
        return self._sources[key]
