"""The V2 model runner (what GPUs run): its model state plans the step."""

from __future__ import annotations

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

from vllm_reroute.attention.step import DUMMY_STEP, RoutedStep
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.step_plan import Places
from vllm_reroute.runners.step_planner import StepPlanner
from vllm_reroute.to_device import to_device


@dataclass
class RoutedAttnMetadata(ModelSpecificAttnMetadata):
    """vLLM's way from a model state to the metadata builders."""

    step: RoutedStep

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        return {"step": self.step}


class RoutedModelState(DefaultModelState):
    """vLLM's default state; `prepare_attn` also plans the step."""

    planner: StepPlanner

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routings: dict[str, RequestRouting | None] = {}

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
        *args: Any,
        for_capture: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        step = DUMMY_STEP
        if not for_capture and not self._is_dummy(input_batch):
            step = self._plan(input_batch, cudagraph_mode, block_tables)
        return super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            *args,
            for_capture=for_capture,
            model_specific_attn_metadata=RoutedAttnMetadata(step),
            **kwargs,
        )

    def _is_dummy(self, input_batch: InputBatch) -> bool:
        """Whether the batch is one of vLLM's dummy runs, whose requests nobody has added.

        Raises RuntimeError where it holds some known requests and some unknown ones.
        """
        known = [req_id in self._routings for req_id in input_batch.req_ids]
        if any(known) != all(known):
            raise RuntimeError(
                "The model runner's batch holds requests that vllm_reroute was not told of."
            )
        return not any(known)

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
