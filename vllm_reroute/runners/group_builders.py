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

from vllm_reroute.attention.step import RoutedStep
from vllm_reroute.kv_cache.spec import LayeredSpec, ParkedSpec

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.utils import AttentionGroup


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
        self._others: list[tuple[int | None, Any, list[str]]] = [
            (
                number if isinstance(spec, ParkedSpec) else None,
                group.get_metadata_builder(),
                group.layer_names,
            )
            for number, (spec, of_group) in enumerate(zip(specs, attn_groups, strict=True))
            for group in of_group
            if number
        ]

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
        for group, builder, names in self._others:
            own = common
            if group is not None and plan.boundary is not None:
                own = copy(common)
                own.block_table_tensor = table_of(group)
            metadata.update(dict.fromkeys(names, builder.build(0, own, step=step)))
