"""What the attention layers of all stages read in a step, filled in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_reroute.kv_cache import interleaving
from vllm_reroute.plan.capacity import RUNNER_COPIES, table_bytes
from vllm_reroute.plan.step_plan import Places, StageLengths, StepPlan
from vllm_reroute.resolved import device_of
from vllm_reroute.to_device import to_device

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_reroute.attention.step_kernel import KernelFill


@dataclass(frozen=True)
class StageViews:
    """The rows of the tables that one stage uses in a step; block tables and slots per layer.

    seq_lens: [requests]; query_start_loc: [requests + 1]; block_tables: [requests, blocks] each;
    slot_mappings: [tokens] each.
    """

    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    block_tables: tuple[torch.Tensor, ...]
    slot_mappings: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class RunnerLengths:
    """The runner's own tensors of a step, on the device, padding included.

    seq_lens: [requests] int32, K/V entries of a request that keeps everything. query_start_loc:
    [requests + 1] int32.
    """

    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor


def write_lengths(plan: StepPlan, seq_lens: np.ndarray, starts: np.ndarray) -> None:
    """All stages' lengths [stages, reqs] and query starts [stages, reqs + 1], into arrays of zeros.

    Rows beyond the plan's requests are padding: length 0, starting where the last one ends.
    """
    planned = plan.num_reqs
    seq_lens[:, :planned] = plan.seq_lens
    np.cumsum(plan.query_lens, axis=1, out=starts[:, 1 : planned + 1])
    starts[:, planned + 1 :] = starts[:, planned : planned + 1]


class StepTables:
    """Device tensors of all stages, allocated once and written in place every step.

    On GPUs one kernel fills them (`step_kernel.py`), elsewhere some operations of torch.

    CUDA graphs replay with the addresses they were captured with, so nothing here moves. Rows
    beyond the batch are padding: length 0, some block, slot `PAD_SLOT_ID`.

    block_tables: [layers, max_reqs, max_blocks] int32, layers in the order of stages.
    slot_mappings: [layers, max_tokens] int64. seq_lens: [stages, max_reqs] int32.
    query_start_loc: [stages, max_reqs + 1] int32.
    """

    block_size: int
    max_tokens: int
    max_blocks: int
    block_tables: torch.Tensor
    slot_mappings: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor

    def __init__(self, num_layers: Sequence[int]) -> None:
        """num_layers: of each stage."""
        self.num_layers = tuple(num_layers)
        self.allocated = False
        self._set_aside: torch.Tensor | None = None

    def reserve(self, vllm_config: VllmConfig, other_layers: int) -> None:
        """Take the room for all block tables while vLLM measures memory, before it sizes its pool.

        That is this object's own, and what the runner's will need once it has a pool: it is set
        aside until then. other_layers: of K/V groups besides the stages'. Later calls do nothing.
        """
        if self.allocated:
            return
        size = vllm_config.cache_config.block_size
        reqs = vllm_config.scheduler_config.max_num_seqs
        max_len = vllm_config.model_config.max_model_len
        device = device_of(vllm_config)
        runners = table_bytes(sum(self.num_layers) + other_layers, reqs, max_len, size)
        # Measured in inference mode, but written in every step.
        with torch.inference_mode(False):
            self.allocate(
                block_size=size,
                max_reqs=reqs,
                max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
                max_blocks=-(-max_len // size),
                device=device,
            )
        self._set_aside = torch.empty(RUNNER_COPIES * runners, dtype=torch.uint8, device=device)

    def release_reserve(self) -> None:
        """The runner is about to allocate its tables."""
        self._set_aside = None

    def allocate(
        self,
        *,
        block_size: int,
        max_reqs: int,
        max_tokens: int,
        max_blocks: int,
        device: torch.device,
    ) -> None:
        """Once the size of a block is known; later calls only check that they ask for no more.

        The longest request may have become shorter since, where vLLM fits it to the pool.
        """
        if self.allocated:
            assert block_size == self.block_size and max_blocks <= self.max_blocks
            return
        stages, layers = len(self.num_layers), sum(self.num_layers)
        self.block_size, self.max_tokens, self.max_blocks = block_size, max_tokens, max_blocks
        self.device = device

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.block_tables = zeros(layers, max_reqs, max_blocks)
        self.slot_mappings = torch.full(
            (layers, max_tokens), PAD_SLOT_ID, dtype=torch.int64, device=device
        )
        self.seq_lens, self.query_start_loc = zeros(stages, max_reqs), zeros(stages, max_reqs + 1)
        stage_of_layer = np.arange(stages).repeat(self.num_layers)
        self._stage_of_layer = torch.from_numpy(stage_of_layer).to(device)
        self._columns = lru_cache(maxsize=64)(self._dealing_columns)
        self._latest: list[tuple[tuple[int, int], StageViews] | None] = [None] * stages
        self.kernel: KernelFill | None = None
        if device.type == "cuda":
            from vllm_reroute.attention.step_kernel import KernelFill

            self.kernel = KernelFill(self)
        self.allocated = True

    def fill(
        self,
        plan: StepPlan,
        interleaved: Sequence[torch.Tensor],
        *,
        num_reqs: int,
        num_tokens: int,
        lengths: RunnerLengths | None = None,
    ) -> None:
        """Write this step's values for all stages.

        interleaved: per stage, the runner's block table [requests, entries] (`interleaving.py`).
        num_reqs, num_tokens: of the step with the runner's padding. lengths: the runner's, which a
        kernel reads in place of the plan's where they say the same.
        """
        if self.kernel is not None:
            self.kernel(
                plan, interleaved, num_reqs=num_reqs, num_tokens=num_tokens, lengths=lengths
            )
            return
        stages = len(self.num_layers)
        running = [lengths.num_tokens for lengths in plan.stages]
        # A stage of more rows runs in pieces, which bring slots of their own.
        whole = [n if n <= self.max_tokens else 0 for n in running]
        width = max(whole)
        # One array, so that one copy takes it all to the device.
        sizes = (stages * num_reqs, stages * (num_reqs + 1), stages * width, stages * width)
        host = np.zeros(sum(sizes), dtype=np.int32)
        seq_lens, starts, entries, offsets = (
            part.reshape(stages, -1) for part in np.split(host, np.cumsum(sizes)[:-1])
        )
        write_lengths(plan, seq_lens, starts)
        self._fill_places(plan, whole, entries, offsets)

        packed = to_device(host, self.device)
        seqs, query_starts, entry, offset = (part.view(stages, -1) for part in packed.split(sizes))
        self.seq_lens[:, :num_reqs].copy_(seqs)
        self.query_start_loc[:, : num_reqs + 1].copy_(query_starts)
        self._deal_blocks(interleaved, num_reqs, int(plan.seq_lens.max(initial=0)))
        if width:
            self.slot_mappings[:, :width].copy_(self._slots(entry, offset))
        if width < num_tokens:
            self.slot_mappings[:, width:num_tokens].fill_(PAD_SLOT_ID)

    def fill_dummy(self, stage: int, common: CommonAttentionMetadata) -> StageViews:
        """A dummy run attends to whatever is there, and writes nowhere."""
        views = self.views(stage, common.num_reqs, common.num_actual_tokens)
        views.seq_lens.copy_(common.seq_lens, non_blocking=True)
        views.query_start_loc.copy_(common.query_start_loc, non_blocking=True)
        for slots in views.slot_mappings:
            slots.fill_(PAD_SLOT_ID)
        return views

    def views(self, stage: int, num_reqs: int, num_tokens: int) -> StageViews:
        """Views of that size; most steps have the size of the one before."""
        latest = self._latest[stage]
        if latest is None or latest[0] != (num_reqs, num_tokens):
            layers = self._layers(stage)
            views = StageViews(
                self.seq_lens[stage, :num_reqs],
                self.query_start_loc[stage, : num_reqs + 1],
                self.block_tables[layers, :num_reqs].unbind(),
                self.slot_mappings[layers, :num_tokens].unbind(),
            )
            latest = self._latest[stage] = (num_reqs, num_tokens), views
        return latest[1]

    def piece_views(self, stage: int, lengths: StageLengths) -> StageViews:
        """Views of a piece of the stage's rows, with lengths and slots of their own."""
        request, position = lengths.request_and_position
        slots = self.slots_of(stage, Places(request.astype(np.int64), position.astype(np.int64)))
        num_reqs = len(lengths.seq_lens)
        return StageViews(
            to_device(lengths.seq_lens, self.device),
            to_device(lengths.query_start_loc, self.device),
            self.block_tables[self._layers(stage), :num_reqs].unbind(),
            slots.unbind(),
        )

    def slots_of(self, stage: int, places: Places, layer: int | None = None) -> torch.Tensor:
        """Slots [layers, n] int64 of tokens, see `blocks_of`."""
        blocks, offsets = self.blocks_of(stage, places, layer)
        return blocks.long() * self.block_size + offsets

    def blocks_of(
        self, stage: int, places: Places, layer: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks [layers, n] int32 of tokens by their place in the stage's K/V, and the offsets [n]
        int64 in them.

        layer: index of the only layer asked for; None for all of the stage.
        """
        layers = self._layers(stage)
        if layer is not None:
            layers = slice(layers.start + layer, layers.start + layer + 1)
        entries = places.request * self.max_blocks + places.position // self.block_size
        packed = to_device(np.stack((entries, places.position % self.block_size)), self.device)
        return self.block_tables[layers].flatten(1).index_select(1, packed[0]), packed[1]

    def _layers(self, stage: int) -> slice:
        first = sum(self.num_layers[:stage])
        return slice(first, first + self.num_layers[stage])

    def _fill_places(
        self, plan: StepPlan, running: list[int], entries: np.ndarray, offsets: np.ndarray
    ) -> None:
        """Where each token's K/V goes: entry of the layer's flattened table, offset in the block.

        An offset of -1 marks padding.
        """
        if plan.boundary is None:
            # All stages run the same tokens: one request axis, shifted by what a stage defers.
            request, position = plan.stages[0].request_and_position
            shift = plan.seq_lens - plan.stages[0].seq_lens
            positions = position + shift[:, request]
            np.divmod(positions, self.block_size, out=(entries, offsets))
            entries += request * self.max_blocks
            return
        for stage, count in enumerate(running):
            offsets[stage, count:] = -1
            if count:
                request, position = plan.stages[stage].request_and_position
                np.divmod(
                    position,
                    self.block_size,
                    out=(entries[stage, :count], offsets[stage, :count]),
                )
                entries[stage, :count] += request * self.max_blocks

    def _slots(self, entries: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """[layers, tokens] int64 of entries and offsets [stages, tokens]."""
        of_layer = self._stage_of_layer
        blocks = self.block_tables.flatten(1).gather(1, entries.long()[of_layer])
        slots = blocks.long() * self.block_size + offsets[of_layer]
        return slots.masked_fill_(offsets[of_layer] < 0, PAD_SLOT_ID)

    def _deal_blocks(
        self, interleaved: Sequence[torch.Tensor], num_reqs: int, max_seq_len: int
    ) -> None:
        """Deal the stages' block ids out to all layers, as far as this step reaches."""
        blocks = min(-(-max_seq_len // self.block_size), self.max_blocks)
        together = torch.cat(
            [
                table[:num_reqs, : layers * blocks]
                for table, layers in zip(interleaved, self.num_layers, strict=True)
            ],
            dim=1,
        )
        dealt = together.index_select(1, self._columns(blocks))
        dealt = dealt.view(num_reqs, len(self.block_tables), blocks)
        self.block_tables[:, :num_reqs, :blocks].copy_(dealt.transpose(0, 1))

    def _dealing_columns(self, num_blocks: int) -> torch.Tensor:
        """[layers * num_blocks] int64: where each layer's blocks are among all stages' entries."""
        columns, width = [], 0
        for layers in self.num_layers:
            columns.append(interleaving.columns(layers, num_blocks).flatten() + width)
            width += layers * num_blocks
        return to_device(np.concatenate(columns), self.device)
