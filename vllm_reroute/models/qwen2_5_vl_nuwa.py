"""Qwen2.5-VL whose vision encoder takes the first decision (Nüwa)."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VisionBlock,
    Qwen2_5_VisionTransformer,
    Qwen2_5_VLImageInputs,
)

from vllm_reroute.models.nuwa import Nuwa, with_anchor_column
from vllm_reroute.models.qwen2_5_vl import RerouteQwen2_5_VLForConditionalGeneration
from vllm_reroute.nuwa.aggregation import QWEN2_5_VL
from vllm_reroute.nuwa.depth import scaled_layer
from vllm_reroute.nuwa.grid import Grid
from vllm_reroute.nuwa.salience import attention_received
from vllm_reroute.routing.scorers.attention import LAST_TOKEN, ScoringRule, alike_on_all_ranks
from vllm_reroute.schedule import RoutingSchedule

_FIRST_FEATURE_BLOCK, _LAST_FEATURE_BLOCK, _PUBLISHED_DEPTH = 7, 23, 32
"""Tokens are alike by the mean output of vision blocks 7 to 23 of 32, through the merger."""

_REMOVE = ScoringRule(num_queries=3, heads="max")
"""The rows Nüwa scores by in this model's decoder."""


class RerouteNuwaQwen2_5_VLForConditionalGeneration(
    Nuwa, RerouteQwen2_5_VLForConditionalGeneration
):
    """Routed Qwen2.5-VL with anchors among its merged visual tokens.

    Salience is the attention a token's patches receive in the last vision block; collectors take in
    the merger's output. The authors' code compares features in the order of attention windows with
    embeddings in raster order; here both are in raster order.
    """

    aggregation = QWEN2_5_VL

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._watch = _TowerWatch(self.visual)

    def scoring(self, schedule: RoutingSchedule) -> ScoringRule:
        return LAST_TOKEN if schedule.reroutes else _REMOVE

    def _process_image_input(self, image_input: Qwen2_5_VLImageInputs) -> tuple[torch.Tensor, ...]:
        """[tokens, hidden + 1] per image, the encoder's rows."""
        assert image_input["type"] == "pixel_values", "image embeddings are refused at start"
        visual, merge = self.visual, self.visual.spatial_merge_size
        shapes = image_input["image_grid_thw"].tolist()
        grids = [Grid(height // merge, width // merge) for _, height, width in shapes]
        sizes = [grid.num_cells for grid in grids]
        metadata = visual.prepare_encoder_metadata(shapes)
        with self._watch as seen:
            states = visual(image_input["pixel_values"], grid_thw=shapes, encoder_metadata=metadata)
        before_last, mean = seen.take()
        raster = metadata["reverse_indices"]
        features = visual.merger(mean)[raster]
        salience = _salience(visual, before_last, metadata, sizes)[raster]
        parts = (whole.split(sizes) for whole in (states, features, salience))
        decided = [self.decide(*image) for image in zip(*parts, grids, strict=True)]
        return tuple(with_anchor_column(*image) for image in decided)


class _WatchedBlock(Qwen2_5_VisionBlock):
    """A vision block that shows its input and output to a watch."""

    watch: _TowerWatch
    index: int

    @staticmethod
    def adopt(block: Any, watch: _TowerWatch, index: int) -> None:
        """Turn a block vLLM has built into a watched one, in place."""
        block.__class__ = _WatchedBlock
        block.watch, block.index = watch, index

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.watch.see_input(self.index, x)
        output = super().forward(x, *args, **kwargs)
        self.watch.see_output(self.index, output)
        return output


class _TowerWatch:
    """What Nüwa reads of the vision tower besides its output, while it is entered.

    It copies: a block may overwrite the tensor the one before has returned.
    """

    def __init__(self, visual: Qwen2_5_VisionTransformer) -> None:
        depth = len(visual.blocks)
        first, last = (
            scaled_layer(block, depth, _PUBLISHED_DEPTH)
            for block in (_FIRST_FEATURE_BLOCK, _LAST_FEATURE_BLOCK)
        )
        self._last_block = depth - 1
        self._feature_blocks = range(first, min(last, depth - 1) + 1)
        self._watching = False
        self._sum: torch.Tensor | None = None
        self._before_last: torch.Tensor | None = None
        for index, block in enumerate(visual.blocks):
            _WatchedBlock.adopt(block, self, index)

    def __enter__(self) -> _TowerWatch:
        self._watching, self._sum, self._before_last = True, None, None
        return self

    def __exit__(self, *_: object) -> None:
        self._watching = False

    def see_input(self, index: int, hidden: torch.Tensor) -> None:
        if self._watching and index == self._last_block:
            self._before_last = hidden.clone()

    def see_output(self, index: int, hidden: torch.Tensor) -> None:
        if not self._watching or index not in self._feature_blocks:
            return
        if self._sum is None:
            self._sum = torch.zeros_like(hidden, dtype=torch.float32)
        self._sum += hidden

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Input of the last block, and mean output of the feature blocks, both [patches, 1, dim]."""
        before = self._before_last
        assert before is not None and self._sum is not None, "the tower has run"
        mean = (self._sum / len(self._feature_blocks)).to(before.dtype)
        self._sum = self._before_last = None
        return before, mean


def _salience(
    visual: Qwen2_5_VisionTransformer,
    hidden: torch.Tensor,
    metadata: dict[str, torch.Tensor],
    sizes: list[int],
) -> torch.Tensor:
    """Attention each merged token's patches receive in the last block, their mean.

    hidden: [patches, 1, dim], the block's input; sizes: merged tokens per image. The block attends
    over whole images. Returns [tokens] in the order of attention windows, fp32.
    """
    block, unit = visual.blocks[-1], visual.spatial_merge_unit
    assert isinstance(block, Qwen2_5_VisionBlock)
    attention = block.attn
    dim = attention.hidden_size_per_attention_head
    fused, _ = attention.qkv(block.norm1(hidden))
    queries_and_keys = fused.view(len(hidden), 3, -1, dim)[:, :2].transpose(0, 1).contiguous()
    rotated = attention.apply_rotary_emb(
        queries_and_keys, metadata["rotary_pos_emb_cos"], metadata["rotary_pos_emb_sin"]
    )
    of_images = (part.split([size * unit for size in sizes]) for part in rotated.unbind(dim=0))
    received = [
        attention_received(queries, keys, dim**-0.5)
        for queries, keys in zip(*of_images, strict=True)
    ]
    salience = alike_on_all_ranks(torch.cat(received), "mean")
    return salience.view(-1, unit).mean(dim=1)
