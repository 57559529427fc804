"""The attention layer of a routed decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as

from vllm_reroute.attention.backend import routed_backend
from vllm_reroute.attention.step_tables import StepTables
from vllm_reroute.kv_cache.spec import PLAIN_CACHE_DTYPES, StageSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_reroute.schedule import RoutingSchedule


@dataclass(frozen=True)
class StagePlace:
    """A layer's place among those of its stage.

    stage: index in the schedule. index: of the layer in the stage. num_layers: of the stage.
    owner: name of the stage's first layer, which owns the K/V pages.
    """

    stage: int
    index: int
    num_layers: int
    owner: str


class RoutedAttention(Attention):
    """Paged attention of one layer of a stage.

    The stage's first layer owns its K/V pages; the others use the same pool through vLLM's KV
    sharing, each with blocks of its own.
    """

    impl: Any
    """Of the backend's class, which routed_backend has extended."""
    place: StagePlace
    tables: StepTables

    @classmethod
    def adopt(cls, layer: Attention, place: StagePlace, tables: StepTables) -> RoutedAttention:
        """Turn a layer vLLM has built into a routed one, in place, so that whatever the model
        family set up stays as it was.

        Raises ValueError for a layer whose window or bias counts positions: a routed cache has no
        entries for deferred tokens, so distances in it are not distances in the prompt.
        """
        _check_supported(layer)
        routed: Any = layer
        routed.attn_backend = routed_backend(layer.attn_backend)
        routed.impl.__class__ = routed.attn_backend.get_impl_cls()
        routed.__class__ = cls
        routed.place, routed.tables = place, tables
        routed.kv_sharing_target_layer_name = place.owner if place.index else None
        return routed

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        assert type(spec) is FullAttentionSpec, type(spec)
        return replace_as(spec, StageSpec, stage=self.place.stage, num_layers=self.place.num_layers)


def route_attention(layers: Sequence[Attention], schedule: RoutingSchedule) -> StepTables:
    """Turn a decoder's attention layers, in order, into routed ones; return their tables.

    Raises ValueError for layers routing cannot replace.
    """
    tables = StepTables([stage.num_layers for stage in schedule.stages])
    for number, stage in enumerate(schedule.stages):
        group = layers[stage.first_layer : stage.end_layer]
        for index, layer in enumerate(group):
            place = StagePlace(number, index, len(group), group[0].layer_name)
            RoutedAttention.adopt(layer, place, tables)
    return tables


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
