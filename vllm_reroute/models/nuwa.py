"""What Nüwa adds to a routed model class: the vision encoder takes the first decision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings

from vllm_reroute.nuwa.aggregation import Aggregation, collect
from vllm_reroute.nuwa.anchors import select_anchors
from vllm_reroute.nuwa.grid import Grid
from vllm_reroute.schedule import RoutingSchedule
from vllm_reroute.schedule.budget import num_kept
from vllm_reroute.to_device import to_device

if TYPE_CHECKING:
    from vllm_reroute.models.rerouted import Rerouted
else:
    # The routed class it stands in front of is one; deriving from it would make this a model, too.
    Rerouted = object


class Nuwa(Rerouted):
    """Mixin in front of a routed class whose vision encoder finds anchors.

    The encoder's rows are one column wider than embeddings: 1 for anchors, 0 for other patches.
    So what it decided goes wherever the embeddings go, vLLM's encoder cache and batches included,
    until they are merged with the text: there the column is split off and kept for the step.

    aggregation: the family's numbers.
    """

    aggregation: Aggregation
    images_only = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        encoder_ratio = RoutingSchedule.of(vllm_config).encoder_ratio
        assert encoder_ratio is not None, "the schedule starts with the encoder's decision"
        self.encoder_ratio = encoder_ratio
        self._anchor_scores: torch.Tensor | None = None

    def decide(
        self, states: torch.Tensor, features: torch.Tensor, salience: torch.Tensor, grid: Grid
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Anchors of one image, and the states with what collectors took in.

        states: [patches, hidden]; features: [patches, dim]; salience: [patches], fp32.
        Returns states like those given and bool [patches].
        """
        num_anchors = num_kept(grid.num_cells, self.encoder_ratio)
        anchors = select_anchors(salience, grid, num_anchors)
        states = collect(states, features, salience, anchors, grid, self.aggregation)
        is_anchor = torch.zeros(grid.num_cells, dtype=torch.bool, device=anchors.device)
        return states, is_anchor.index_fill_(0, anchors, True)

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._anchor_scores = None
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            columns = torch.cat([rows[:, -1] for rows in multimodal_embeddings])
            scores = columns.new_zeros(len(input_ids), dtype=torch.float32)
            # An index by a mask would wait: on the host for a copy, on the device for its result.
            mask = is_multimodal
            assert mask is not None, "vLLM hands both or none"
            if mask.device.type == "cpu":
                mask = to_device(mask.numpy(), scores.device)
            scores.masked_scatter_(mask, columns.float())
            self._anchor_scores = scores
            multimodal_embeddings = [rows[:, :-1] for rows in multimodal_embeddings]
        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def encoder_scores(self, num_tokens: int) -> torch.Tensor | None:
        return self._anchor_scores

    def step_done(self, num_tokens: int) -> None:
        super().step_done(num_tokens)
        self._anchor_scores = None


def with_anchor_column(embeddings: torch.Tensor, is_anchor: torch.Tensor) -> torch.Tensor:
    """[..., hidden] and bool [...] as the encoder's rows, [..., hidden + 1]."""
    column = is_anchor.unsqueeze(-1).to(embeddings.dtype)
    return torch.cat((embeddings, column), dim=-1)
