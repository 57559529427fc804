"""Qwen3-VL with routed visual tokens."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.sequence import IntermediateTensors

from vllm_reroute.models.rerouted import Rerouted


class RerouteQwen3VLForConditionalGeneration(Rerouted, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL; its decoder runs stage by stage.

    Deepstack adds features of the vision tower's middle blocks after the first decoder layers.
    """

    def layer_additions(self, num_tokens: int) -> IntermediateTensors | None:
        return self._get_deepstack_input_embeds(num_tokens)

    def step_done(self, num_tokens: int) -> None:
        self._clear_deepstack_input_embeds(num_tokens)
