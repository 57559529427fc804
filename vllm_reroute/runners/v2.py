"""The V2 model runner (what GPUs run): its model state plans the step."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_reroute.plan.step_plan import RequestRouting, plan_step
from vllm_reroute.plan.visual_spans import VisualSpans


class RoutedModelState(DefaultModelState):
    """vLLM's default state; `prepare_attn` also leaves the step's plan for the builders."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        decoder = self.model.routed_decoder
        self.routing_step = decoder.routing_step
        self.schedule = decoder.schedule
        self.routings: dict[str, RequestRouting | None] = {}

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        # The prompt alone: after a preemption the prefill also holds generated tokens.
        prompt = new_req_data.prompt_token_ids or ()
        spans = VisualSpans.of(new_req_data.mm_features)
        self.routings[new_req_data.req_id] = RequestRouting.of(
            spans, prompt, self.schedule.ratios, self.schedule.encoder_ratio
        )

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.routings.pop(req_id, None)

    def prepare_attn(
        self, input_batch: InputBatch, *args: Any, for_capture: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        self.routing_step.plan = None
        if not for_capture:
            num_reqs = input_batch.num_reqs
            self.routing_step.plan = plan_step(
                num_computed=input_batch.num_computed_tokens_np[:num_reqs].astype(np.int64),
                num_scheduled=input_batch.num_scheduled_tokens[:num_reqs].astype(np.int64),
                routings=[self.routings.get(r) for r in input_batch.req_ids[:num_reqs]],
                ratios=self.schedule.ratios,
            )
        return super().prepare_attn(input_batch, *args, for_capture=for_capture, **kwargs)
