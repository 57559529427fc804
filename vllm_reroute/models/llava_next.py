"""LLaVA-NeXT (1.6) with routed visual tokens."""

from __future__ import annotations

from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration

from vllm_reroute.models.rerouted import Rerouted


class RerouteLlavaNextForConditionalGeneration(Rerouted, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT (1.6); its decoder runs stage by stage."""
