"""One thin adapter per vLLM model runner: both hand a `StepPlan` to the metadata builders."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def connect_runner(vllm_config: VllmConfig) -> None:
    """Make the worker's model runner plan every step.

    The V2 runner asks the model for its `RoutedModelState`; the V1 runner needs a hook.
    """
    if not vllm_config.use_v2_model_runner:
        from vllm_reroute.runners.v1_hook import MODEL_RUNNER_V1

        MODEL_RUNNER_V1.install()
