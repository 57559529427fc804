"""The V2 model runner (what GPUs run): its model state plans the step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata
from vllm.v1.worker.utils import AttentionGroup

from vllm_reroute.attention.step import DUMMY_STEP, RoutedStep, check_graph
from vllm_reroute.attention.step_tables import RunnerLengths
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.step_plan import Places
from vllm_reroute.runners.group_builders import GroupBuilders
from vllm_reroute.runners.step_planner import StepPlanner
from vllm_reroute.runners.warm_up import WarmUp
from vllm_reroute.to_device import to_device

_DUMMY_NAME = re.compile(r"req_\d+_")
"""What `InputBatch.make_dummy` calls its requests."""


@dataclass
class RoutedAttnMetadata(ModelSpecificAttnMetadata):
    """vLLM's way from a model state to the metadata builders."""

    step: RoutedStep

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        return {"step": self.step}


class RoutedModelState(DefaultModelState):
    """vLLM's default state; `prepare_attn` also plans the step."""

    model: Any
    """A routed one."""
    planner: StepPlanner

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routings: dict[str, RequestRouting | None] = {}
        self._is_warm = False
        self._builders: GroupBuilders | None = None

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.planner = StepPlanner(self.vllm_config, kv_cache_config, self.model.routed_decoder)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        # The prompt alone: after a preemption the prefill also holds generated tokens.
        self._routings[new_req_data.req_id] = self.planner.request_routing(
            new_req_data.mm_features,
            new_req_data.prompt_token_ids,
            new_req_data.sampling_params,
        )

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._routings.pop(req_id, None)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        *args: Any,
        for_capture: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        def stock(step: RoutedStep, config: KVCacheConfig) -> dict[str, Any]:
            return super(RoutedModelState, self).prepare_attn(  # type: ignore[misc]  # a later vLLM's args
                input_batch,
                cudagraph_mode,
                block_tables,
                slot_mappings,
                attn_groups,
                config,
                *args,
                for_capture=for_capture,
                model_specific_attn_metadata=RoutedAttnMetadata(step),
                **kwargs,
            )

        if self._is_dummy(input_batch):
            return stock(DUMMY_STEP, kv_cache_config)
        if for_capture:
            raise RuntimeError("A CUDA graph is to be captured over a batch of real requests.")
        self._warm_up(attn_groups, kv_cache_config)
        if self._builders is None:
            self._builders = GroupBuilders(kv_cache_config, attn_groups)
        step = self._plan(input_batch, cudagraph_mode, block_tables)
        check_graph(step, full_graph=cudagraph_mode == CUDAGraphMode.FULL)
        metadata = stock(step, self._builders.first)
        self._builders.complete(metadata, step, block_tables.__getitem__)
        return metadata

    def _warm_up(
        self, attn_groups: list[list[AttentionGroup]], kv_cache_config: KVCacheConfig
    ) -> None:
        """Once, in the first step: at start, where vLLM warms up its kernels with steps of its own."""
        if not self._is_warm:
            self._is_warm = True
            WarmUp(self.vllm_config, kv_cache_config, self.model, attn_groups, self.device).run()

    def _is_dummy(self, input_batch: InputBatch) -> bool:
        """Whether the batch is one of vLLM's dummy runs, whose requests have names of their own.

        Raises RuntimeError where it holds a request nobody has added: it would not be routed.
        """
        unknown = [name for name in input_batch.req_ids if name not in self._routings]
        if not unknown:
            return False
        if len(unknown) < len(input_batch.req_ids) or not all(map(_DUMMY_NAME.match, unknown)):
            raise RuntimeError(
                "The model runner's batch holds requests that vllm_reroute was not told of: "
                f"{', '.join(unknown[:3])}."
            )
        return True

    def _plan(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
    ) -> RoutedStep:
        num_reqs, num_tokens = input_batch.num_reqs, input_batch.num_tokens
        if cudagraph_mode == CUDAGraphMode.FULL:
            num_reqs = input_batch.num_reqs_after_padding
            num_tokens = input_batch.num_tokens_after_padding
        count = input_batch.num_reqs

        def positions_of(places: Places) -> torch.Tensor:
            return self._positions(input_batch, places)

        return self.planner.plan(
            list(map(self._routings.__getitem__, input_batch.req_ids[:count])),
            lambda routing: routing,
            input_batch.num_computed_tokens_np[:count],
            input_batch.num_scheduled_tokens[:count],
            block_tables,
            num_reqs=num_reqs,
            num_tokens=num_tokens,
            positions_of=positions_of,
            lengths=RunnerLengths(input_batch.seq_lens, input_batch.query_start_loc),
        )

    def _positions(self, input_batch: InputBatch, places: Places) -> torch.Tensor:
        """Rope positions of earlier prompt tokens; where they have three parts, from the device."""
        if self.rope_state is None:
            return to_device(places.position, self.device)
        table, dims = self.rope_state.prefill_positions.gpu, self.rope_state.num_dims
        slots = input_batch.idx_mapping_np[places.request].astype(np.int64)
        rows = slots * dims + np.arange(dims)[:, None]
        columns = np.broadcast_to(places.position, rows.shape)
        packed = to_device(np.stack((rows, columns)), self.device)
        return table[packed[0], packed[1]].long()
