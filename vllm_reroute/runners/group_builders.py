"""Attention metadata of a step: vLLM makes that of the first K/V group, the rest is made from it in one go.

vLLM's runners go through all groups in every step, and copy for each of them what all have in common. Groups of a
routed engine differ in nothing that their builders do not know from the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vllm_reroute.attention.metadata import StageMetadata
from vllm_reroute.attention.step import RoutedStep
from vllm_reroute.kv_cache.spec import LayeredSpec, StageSpec

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.utils import AttentionGroup

    from vllm_reroute.plan.step_plan import StepPlan


class GroupBuilders:
    """The builders of a routed engine's K/V groups.

    first: the engine's config with its first group only, for vLLM to go through in a step. of_first: the
    builders of that group.
    """

    def __init__(
        self, kv_cache_config: KVCacheConfig, attn_groups: Sequence[Sequence[AttentionGroup]]
    ) -> None:
        groups = kv_cache_config.kv_cache_groups
        specs = [group.kv_cache_spec for group in groups]
        assert all(isinstance(spec, LayeredSpec) for spec in specs), "all groups are routed ones"
        self.first = replace(kv_cache_config, kv_cache_groups=groups[:1])
        self.of_first: list[Any] = [group.get_metadata_builder() for group in attn_groups[0]]
        others = [
            (number, group.get_metadata_builder(), group.layer_names)
            for number, of_group in enumerate(attn_groups)
            for group in of_group
            if number
        ]
        self._stages: list[tuple[Any, list[str]]] = []
        self._parked: list[tuple[int, Any, list[str]]] = []
        for number, builder, names in others:
            if isinstance(specs[number], StageSpec):
                self._stages.append((builder, names))
            else:
                self._parked.append((number, builder, names))
        self._size: tuple[int, int] | None = None
        self._made: list[tuple[Any, StageMetadata]] = []
        self._by_layer: dict[str, StageMetadata | None] = {}

    def complete(
        self,
        metadata: dict[str, Any],
        step: RoutedStep,
        table_of: Callable[[int], torch.Tensor],
    ) -> None:
        """Add the other groups' metadata, by layer name, to that of the first group.

        table_of: the runner's block table of a group, [requests, entries], for pages of parked states; stages
        have tables of their own.
        """
        common, plan = step.common, step.plan
        assert common is not None and plan is not None, "the first group's builder has been asked"
        if plan.boundary is None:
            metadata.update(self._undivided(step, plan, common))
            return
        for builder, names in self._stages:
            metadata.update(dict.fromkeys(names, builder.build(0, common, step=step)))
        for group, builder, names in self._parked:
            own = copy(common)
            own.block_table_tensor = table_of(group)
            metadata.update(dict.fromkeys(names, builder.build(0, own, step=step)))

    def _undivided(
        self, step: RoutedStep, plan: StepPlan, common: CommonAttentionMetadata
    ) -> dict[str, StageMetadata | None]:
        """Where every stage runs the same tokens: made once per size, since then only the plan and what
        backends make of lengths change."""
        size = common.num_reqs, common.num_actual_tokens
        if self._size != size:
            self._size, self._made = size, []
            self._by_layer = {name: None for *_, names in self._parked for name in names}
            for builder, names in self._stages:
                own = StageMetadata(plan, None, builder.views(common, common.num_actual_tokens))
                self._made.append((builder, own))
                self._by_layer.update(dict.fromkeys(names, own))
        for builder, own in self._made:
            own.plan, own.shared = plan, builder.shared(step, plan, common, own.views)
        return self._by_layer
