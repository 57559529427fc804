"""Qwen2.5-VL with routed visual tokens."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from vllm_reroute.models.rerouted import Rerouted


class RerouteQwen2_5_VLForConditionalGeneration(Rerouted, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL; its decoder runs stage by stage."""
