"""What the attention layers of all stages read in a step, filled in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_reroute.attention.host_fill import HostFill
from vllm_reroute.plan.capacity import RUNNER_COPIES, table_bytes
from vllm_reroute.plan.step_plan import Places, StageLengths, StepPlan
from vllm_reroute.resolved import device_of
from vllm_reroute.to_device import to_device

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_reroute.attention.step_kernel import KernelFill


_MOST_VIEWS = 32
"""Sizes that are remembered: steps of the same sizes come again."""


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


class StepTables:
    """Device tensors of all stages, allocated once and written in place every step.

    On GPUs one kernel fills them (`step_kernel.py`); on CPU the host writes into them directly.

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
        self._latest: list[tuple[tuple[int, int], StageViews] | None] = [None] * stages
        self._views_of: dict[tuple[str, int], tuple[torch.Tensor, ...]] = {}
        self.kernel: KernelFill | None = None
        self._host = HostFill(self) if device.type == "cpu" else None
        if device.type == "cuda":
            from vllm_reroute.attention.step_kernel import KernelFill

            self.kernel = KernelFill(self)
        self.allocated = True

    def fill(
        self,
        plan: StepPlan,
        interleaved: Sequence[torch.Tensor] | None,
        *,
        num_reqs: int,
        num_tokens: int,
        lengths: RunnerLengths | None = None,
    ) -> None:
        """Write this step's values for all stages.

        interleaved: per stage, the runner's block table [requests, entries] (`interleaving.py`); None
        where the runner keeps its blocks in `block_tables` itself. num_reqs, num_tokens: of the step
        with the runner's padding. lengths: the runner's, which a kernel reads in place of the plan's
        where they say the same.
        """
        if self.kernel is not None:
            assert interleaved is not None
            self.kernel(
                plan, interleaved, num_reqs=num_reqs, num_tokens=num_tokens, lengths=lengths
            )
            return
        assert self._host is not None, "the host writes where it can reach"
        self._host(plan, interleaved, num_reqs=num_reqs, num_tokens=num_tokens)

    def of_stage(self, stage: int) -> torch.Tensor:
        """Block tables [layers, max_reqs, max_blocks] of a stage's layers."""
        return self.block_tables[self.layers_of(stage)]

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
            layers = self.layers_of(stage)
            views = StageViews(
                self._cut("seq_lens", num_reqs)[stage],
                self._cut("query_start_loc", num_reqs + 1)[stage],
                self._cut("block_tables", num_reqs)[layers],
                self._cut("slot_mappings", num_tokens)[layers],
            )
            latest = self._latest[stage] = (num_reqs, num_tokens), views
        return latest[1]

    def _cut(self, table: str, size: int) -> tuple[torch.Tensor, ...]:
        """A table cut to `size` requests or tokens, a view for each stage or layer, all made at once."""
        if (table, size) not in self._views_of:
            if len(self._views_of) >= _MOST_VIEWS:
                self._views_of.clear()
            self._views_of[table, size] = getattr(self, table)[:, :size].unbind()
        return self._views_of[table, size]

    def piece_views(self, stage: int, lengths: StageLengths) -> StageViews:
        """Views of a piece of the stage's rows, with lengths and slots of their own."""
        request, position = lengths.request_and_position
        slots = self.slots_of(stage, Places(request.astype(np.int64), position.astype(np.int64)))
        num_reqs = len(lengths.seq_lens)
        return StageViews(
            to_device(lengths.seq_lens, self.device),
            to_device(lengths.query_start_loc, self.device),
            self.block_tables[self.layers_of(stage), :num_reqs].unbind(),
            slots.unbind(),
        )

    def slots_in_step(self, stage: int, num_tokens: int) -> torch.Tensor:
        """Slots [num_tokens] int64 that the stage's first layer writes, in a step of no more than `max_tokens`."""
        return self.slot_mappings[self.layers_of(stage).start, :num_tokens]

    def slots_of(self, stage: int, places: Places, layer: int | None = None) -> torch.Tensor:
        """Slots [layers, n] int64 of tokens by their place in the stage's K/V, see `blocks_at`."""
        entries = self.entries_of(places)
        return torch.add(entries[1], self.blocks_at(stage, entries, layer), alpha=self.block_size)

    def entries_of(self, places: Places) -> torch.Tensor:
        """[2, n] int64, the same for all layers: entries of tokens in a layer's block tables, laid out
        one behind the other, and the tokens' offsets in their blocks."""
        entries = places.request * self.max_blocks + places.position // self.block_size
        return to_device(np.stack((entries, places.position % self.block_size)), self.device)

    def blocks_at(
        self, stage: int, entries: torch.Tensor, layer: int | None = None
    ) -> torch.Tensor:
        """Blocks [layers, n] int32 at `entries_of` tokens.

        layer: index of the only layer asked for; None for all of the stage.
        """
        layers = self.layers_of(stage)
        if layer is not None:
            layers = slice(layers.start + layer, layers.start + layer + 1)
        return self.block_tables[layers].flatten(1).index_select(1, entries[0])

    def layers_of(self, stage: int, after: int | None = None) -> slice:
        """A stage's layers among all; those of the stages from it on up to stage `after`."""
        end = stage + 1 if after is None else after
        return slice(sum(self.num_layers[:stage]), sum(self.num_layers[:end]))
