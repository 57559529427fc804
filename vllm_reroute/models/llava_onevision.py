"""LLaVA-OneVision with routed visual tokens."""

from __future__ import annotations

from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration

from vllm_reroute.models.rerouted import Rerouted


class RerouteLlavaOnevisionForConditionalGeneration(
    Rerouted, LlavaOnevisionForConditionalGeneration
):
    """vLLM's LLaVA-OneVision; its decoder runs stage by stage."""
