"""LLaVA-1.5 with routed visual tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.sequence import IntermediateTensors

from vllm_reroute.routing.decoder import RoutedDecoder
from vllm_reroute.runners import connect_runner


class RerouteLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """vLLM's LLaVA-1.5; only the loop over the decoder's layers is replaced."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        connect_runner(vllm_config)
        decoder = self.language_model.model
        self.routed_decoder = RoutedDecoder(decoder.layers, decoder.norm, vllm_config)

    @classmethod
    def get_model_state_cls(cls) -> type:
        """Asked for by the V2 model runner."""
        from vllm_reroute.runners.v2 import RoutedModelState

        return RoutedModelState

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        assert intermediate_tensors is None, "pipeline parallelism is refused at start"
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.routed_decoder(inputs_embeds, positions)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = super().load_weights(weights)
        self.routed_decoder.take_key_weights()
        return loaded
