"""V1 model runner: plan the step before attention metadata is built.

The metadata builders see neither request ids nor prompt lengths nor image ranges, and the V1
runner offers no hook of its own (V2 does: `ModelState.prepare_attn`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_reroute.vllm_seams.hook import Hook


def _build_attention_metadata(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    from vllm_reroute.runners.v1 import planned_step

    with planned_step(
        self,
        num_tokens=kwargs.get("num_tokens_padded") or kwargs["num_tokens"],
        num_reqs=kwargs.get("num_reqs_padded") or kwargs["num_reqs"],
        num_scheduled_tokens=kwargs.get("num_scheduled_tokens"),
        # What a step samples from; a dummy run has none.
        dummy=kwargs.get("logits_indices") is None,
        capturing=bool(kwargs.get("for_cudagraph_capture")),
        # Only a full graph pads what attention sees.
        full_graph=kwargs.get("num_tokens_padded") is not None,
    ) as complete:
        built = original(self, *args, **kwargs)
        complete(built[0])
        return built


MODEL_RUNNER_V1 = Hook(
    name="v1_build_attention_metadata",
    module="vllm.v1.worker.gpu_model_runner",
    qualname="GPUModelRunner._build_attention_metadata",
    parameters=("self", "num_tokens", "num_reqs", "max_query_len"),
    wrapper=_build_attention_metadata,
)
