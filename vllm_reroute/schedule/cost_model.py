"""What one image request costs by arithmetic: FLOPs of its prefill, bytes its decode steps read.

Counts, not times: no kernel is run and no hardware is known here. A multiply-add is two FLOPs; norms,
activations, rotary embeddings, sampling and everything on the host are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_reroute.schedule.routing_schedule import RoutingSchedule, Stage

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The decoder's matrices: attention projections and a gated feed-forward network per layer."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @classmethod
    def of(cls, text_config: PretrainedConfig) -> DecoderShape:
        heads = text_config.num_attention_heads
        return cls(
            num_layers=text_config.num_hidden_layers,
            hidden_size=text_config.hidden_size,
            num_heads=heads,
            num_kv_heads=text_config.num_key_value_heads,
            head_dim=getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
            intermediate_size=text_config.intermediate_size,
            vocab_size=text_config.vocab_size,
        )

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width of K, and of V."""
        return self.num_kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Weights every token of a layer is multiplied with."""
        attention = 2 * self.query_size + 2 * self.key_size
        return self.hidden_size * (attention + 3 * self.intermediate_size)

    @property
    def step_parameters(self) -> int:
        """Weights a decode step reads: all layers and the output head."""
        return self.num_layers * self.layer_parameters + self.hidden_size * self.vocab_size

    def layer_flops(self, num_tokens: int) -> int:
        """One layer's prefill of `num_tokens` tokens, each attending to itself and those before."""
        return self.rows_flops(num_tokens, 0)

    def rows_flops(self, num_tokens: int, before: int) -> int:
        """The same behind `before` tokens that are in the K/V cache."""
        linear = 2 * num_tokens * self.layer_parameters
        # Query·key and weights·value, over n(n+1)/2 pairs each, and n times those before.
        pairs_twice = num_tokens * (num_tokens + 1 + 2 * before)
        return linear + 2 * self.query_size * pairs_twice

    def decision_flops(self, num_tokens: int) -> int:
        """Scoring `num_tokens` present tokens: all keys, and the last prompt token's one row."""
        keys = 2 * num_tokens * self.hidden_size * self.key_size
        query = 2 * self.hidden_size * (self.query_size + 2 * self.key_size)
        return keys + query + 2 * self.query_size * num_tokens


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """The vision tower, and the projector behind it.

    num_patches: that run per image. span: patches each attends to in the layers that are not global.
    mlp_matrices: 2, or 3 where gated. projector_flops: of one image.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    mlp_matrices: int
    num_patches: int
    span: int
    global_layers: int
    projector_flops: int

    @property
    def flops(self) -> int:
        """Of one image."""
        weights = 4 * self.hidden_size**2
        weights += self.mlp_matrices * self.hidden_size * self.intermediate_size
        linear = 2 * self.num_patches * weights * self.num_layers
        local_layers = self.num_layers - self.global_layers
        pairs = self.num_patches * (
            self.global_layers * self.num_patches + local_layers * self.span
        )
        return linear + 4 * self.hidden_size * pairs + self.projector_flops


def vision_shape(config: PretrainedConfig, num_visual: int) -> VisionShape | None:
    """The tower of a LLaVA-1.5 or a Qwen2.5-VL for an image of `num_visual` tokens; None for others."""
    vision, text = config.vision_config, config.get_text_config()
    if vision.model_type == "clip_vision_model" and config.model_type == "llava":
        # The class token runs too; layers above the one that is read do not.
        read = config.vision_feature_layer
        if not isinstance(read, int):
            return None
        layers = vision.num_hidden_layers + 1 + read if read < 0 else read
        projector = vision.hidden_size * text.hidden_size + text.hidden_size**2
        return VisionShape(
            num_layers=layers,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            mlp_matrices=2,
            num_patches=num_visual + 1,
            span=num_visual + 1,
            global_layers=layers,
            projector_flops=2 * num_visual * projector,
        )
    if config.model_type == "qwen2_5_vl":
        merged = vision.spatial_merge_size**2
        width = merged * vision.hidden_size
        return VisionShape(
            num_layers=vision.depth,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            mlp_matrices=3,
            num_patches=merged * num_visual,
            span=min(merged * num_visual, (vision.window_size // vision.patch_size) ** 2),
            global_layers=len(vision.fullatt_block_indexes),
            projector_flops=2 * num_visual * width * (width + text.hidden_size),
        )
    return None


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage's prefill. num_tokens: kept visual tokens and text. decision: FLOPs of the choice before it."""

    stage: Stage
    num_tokens: int
    flops: int
    dense_flops: int
    decision_flops: int


@dataclass(frozen=True, kw_only=True)
class RequestCost:
    """One request's prefill and decode.

    image_sizes: visual tokens of each image. num_text: prompt and answer, as in `RequestFootprint`.
    vision: of ONE image, None where it is not known; it is then left out of both totals.
    """

    decoder: DecoderShape
    vision: VisionShape | None
    schedule: RoutingSchedule
    image_sizes: tuple[int, ...]
    num_text: int

    @property
    def kept(self) -> list[int]:
        return self.schedule.kept_per_stage(*self.image_sizes)

    @property
    def stages(self) -> list[StageCost]:
        visual, dense = sum(self.image_sizes), sum(self.image_sizes) + self.num_text
        decided = {d.layer: d for d in self.schedule.decisions if d.scored_at is not None}
        costs, present = [], visual
        for stage, kept in zip(self.schedule.stages, self.kept, strict=True):
            decision = decided.get(stage.first_layer)
            costs.append(
                StageCost(
                    stage=stage,
                    num_tokens=kept + self.num_text,
                    flops=stage.num_layers * self.decoder.layer_flops(kept + self.num_text),
                    dense_flops=stage.num_layers * self.decoder.layer_flops(dense),
                    decision_flops=(
                        self.decoder.decision_flops(present + self.num_text)
                        if decision is not None and kept < present
                        else 0
                    ),
                )
            )
            # What the encoder rejects under variant A is gone as well.
            removes = {d.layer: d.removes for d in self.schedule.decisions}
            if removes.get(stage.first_layer, False):
                present = kept
        return costs

    @property
    def fixed_flops(self) -> int:
        """What routing does not change: the vision tower, and the output head's one row."""
        vision = self.vision.flops * len(self.image_sizes) if self.vision else 0
        return vision + 2 * self.decoder.hidden_size * self.decoder.vocab_size

    @property
    def dense_flops(self) -> int:
        return self.fixed_flops + sum(cost.dense_flops for cost in self.stages)

    @property
    def routed_flops(self) -> int:
        return self.fixed_flops + sum(cost.flops + cost.decision_flops for cost in self.stages)

    @property
    def token_ratio(self) -> float:
        """Layer·token products, routed over dense, text included."""
        dense = self.schedule.num_layers * (sum(self.image_sizes) + self.num_text)
        return sum(c.stage.num_layers * c.num_tokens for c in self.stages) / dense

    def kv_values(self, *, routed: bool) -> int:
        """K and V values a decode step reads for this request, over all layers."""
        per_token = 2 * self.decoder.key_size
        if routed:
            return per_token * sum(c.stage.num_layers * c.num_tokens for c in self.stages)
        visual = sum(self.image_sizes)
        return per_token * self.schedule.num_layers * (visual + self.num_text)

    def step_values(self, batch: int, *, routed: bool) -> int:
        """Weights and K/V values that a decode step of `batch` such requests reads."""
        return self.decoder.step_parameters + batch * self.kv_values(routed=routed)
