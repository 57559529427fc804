"""The attention layer of a routed decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as

from vllm_reroute.attention.backend import routed_backend
from vllm_reroute.kv_cache.spec import PLAIN_CACHE_DTYPES, RoutedAttentionSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_reroute.plan.step_plan import StepPlan
    from vllm_reroute.schedule import RoutingSchedule


@dataclass
class RoutingStep:
    """Where a runner leaves the plan of the step it is about to run.

    plan: written by the runner's adapter before it builds attention metadata, read by the
    metadata builders; None for a dummy run.
    """

    plan: StepPlan | None = None


class RoutedAttention(Attention):
    """Paged attention of one layer in a group of layers with equal keep ratio.

    Made from a layer vLLM has built (`route_attention`), so that whatever the model family set
    up stays as it was. The group's first layer owns the group's K/V pages; the others use the
    same pool through vLLM's KV sharing, each with blocks of its own.
    """

    keep_ratio: float
    encoder_ratio: float | None
    layer_in_group: int
    num_layers_in_group: int
    routing_step: RoutingStep

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        assert type(spec) is FullAttentionSpec, type(spec)
        return replace_as(
            spec,
            RoutedAttentionSpec,
            keep_ratio=self.keep_ratio,
            encoder_ratio=self.encoder_ratio,
            num_layers=self.num_layers_in_group,
        )


def route_attention(
    layers: list[Attention], schedule: RoutingSchedule, routing_step: RoutingStep
) -> None:
    """Turn a decoder's attention layers into routed ones, in place.

    layers: one per decoder layer, in order.

    Raises ValueError for a layer whose window or bias counts positions: a routed cache has no
    entries for deferred tokens, so distances in it are not distances in the prompt.
    """
    for ratio in schedule.ratios:
        group = [layers[i] for i in schedule.layers_with(ratio)]
        for index, layer in enumerate(group):
            _check_supported(layer)
            layer.attn_backend = routed_backend(layer.attn_backend)
            layer.impl.__class__ = layer.attn_backend.get_impl_cls()
            layer.__class__ = RoutedAttention
            layer.keep_ratio = ratio
            layer.encoder_ratio = schedule.encoder_ratio
            layer.layer_in_group = index
            layer.num_layers_in_group = len(group)
            layer.routing_step = routing_step
            layer.kv_sharing_target_layer_name = group[0].layer_name if index else None


def _check_supported(layer: Attention) -> None:
    if type(layer) is not Attention or layer.kv_sharing_target_layer_name is not None:
        raise ValueError(
            f"Layer {layer.layer_name} uses {type(layer).__name__}, which routing cannot replace. "
            "Serve this model without --reroute-schedule."
        )
    if layer.kv_cache_dtype not in PLAIN_CACHE_DTYPES:
        raise ValueError(
            f"Layer {layer.layer_name} has a K/V cache of type {layer.kv_cache_dtype!r}, as the "
            "checkpoint asks for, which routing has not been tested with. Allowed: "
            f"{', '.join(PLAIN_CACHE_DTYPES)}. Add --kv-cache-dtype bfloat16, or serve without "
            "--reroute-schedule."
        )
    if layer.sliding_window is not None:
        raise ValueError(
            f"Layer {layer.layer_name} has a sliding window of {layer.sliding_window} tokens, which "
            "a routed KV cache cannot honour. Serve without --reroute-schedule, or switch the "
            "window off with --disable-sliding-window if the model allows it."
        )
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        raise ValueError(
            f"Layer {layer.layer_name} uses ALiBi position biases, which a routed KV cache cannot "
            "honour. Serve this model without --reroute-schedule."
        )
