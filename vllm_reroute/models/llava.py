"""LLaVA-1.5 with routed visual tokens."""

from __future__ import annotations

from vllm.model_executor.models.llava import LlavaForConditionalGeneration

from vllm_reroute.models.rerouted import Rerouted


class RerouteLlavaForConditionalGeneration(Rerouted, LlavaForConditionalGeneration):
    """vLLM's LLaVA-1.5; its decoder runs stage by stage."""
