"""What every routed model class adds to vLLM's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.sequence import IntermediateTensors

from vllm_reroute.admission.processor import admitting
from vllm_reroute.routing.decoder import RoutedDecoder
from vllm_reroute.routing.scorers.attention import LAST_TOKEN, ScoringRule
from vllm_reroute.runners import connect_runner
from vllm_reroute.schedule import RoutingSchedule

if TYPE_CHECKING:

    class _Stock(torch.nn.Module):
        """What the mixin needs of the class of vLLM's that it stands in front of."""

        _processor_factory: Any
        language_model: Any
        embed_input_ids: Any

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None: ...
else:
    _Stock = object


class Rerouted(_Stock):
    """Mixin in front of a vLLM vision-language model: only the loop over decoder layers changes.

    Vision tower, merging of embeddings, positions, weights and processor stay vLLM's. A family
    whose decoder is not `language_model.model` overrides `decoder`; one that adds features
    between layers overrides `layer_additions`.

    images_only: whether requests with videos are refused.
    """

    images_only = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls._processor_factory = admitting(cls._processor_factory, images_only=cls.images_only)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        connect_runner(vllm_config)
        decoder = self.decoder
        self.routed_decoder = RoutedDecoder(
            decoder.layers, decoder.norm, vllm_config, self.scoring(RoutingSchedule.of(vllm_config))
        )

    @property
    def decoder(self) -> Any:
        """The module that holds the decoder's `layers` and its final `norm`."""
        return self.language_model.model

    def scoring(self, schedule: RoutingSchedule) -> ScoringRule:
        """The attention rows that score this family's visual tokens."""
        return LAST_TOKEN

    def encoder_scores(self, num_tokens: int) -> torch.Tensor | None:
        """[tokens] fp32: the vision encoder's decision, for schedules that start with one."""
        return None

    def layer_additions(self, num_tokens: int) -> IntermediateTensors | None:
        """[tokens, hidden] tensors to add after layers 0, 1, …, in order; None for most families.

        As many as `first_decision_layer` (`deepstack.py`) allows for: all are in before the first
        decision.
        """
        return None

    def step_done(self, num_tokens: int) -> None:
        """Called at the end of every step, to drop what the step's embeddings brought along."""

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
        num_tokens = len(inputs_embeds)
        additions = self.layer_additions(num_tokens)
        output = self.routed_decoder(
            inputs_embeds, positions, additions, self.encoder_scores(num_tokens)
        )
        self.step_done(num_tokens)
        return output
