"""Qwen2-VL with routed visual tokens."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration

from vllm_reroute.models.rerouted import Rerouted


class RerouteQwen2VLForConditionalGeneration(Rerouted, Qwen2VLForConditionalGeneration):
    """vLLM's Qwen2-VL; its decoder runs stage by stage."""
