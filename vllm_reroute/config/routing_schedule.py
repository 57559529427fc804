"""The resolved routing schedule every process of an engine reads."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_reroute.config.budget import REFERENCE_VISUAL_TOKENS, average_visual_tokens, num_kept
from vllm_reroute.config.schedules import Action

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_KEY = "reroute"
"""Key of the reroute options and of the resolved schedule in `VllmConfig.additional_config`."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Decoder layers between two decisions.

    first_layer: inclusive; the decision layer, or 0 for the dense first stage.
    end_layer: exclusive.
    keep_ratio: share of the request's original visual tokens that run here, in (0, 1].
    """

    first_layer: int
    end_layer: int
    keep_ratio: float

    @property
    def num_layers(self) -> int:
        return self.end_layer - self.first_layer


@dataclass(frozen=True, kw_only=True)
class RoutingSchedule:
    """What to route where, complete and checked before the engine starts.

    name: `fastv`, `pdrop` or `custom`. num_layers: decoder layers of the model.
    layers: decision layers, strictly increasing, in [1, num_layers).
    keep: one ratio per decision layer; for `remove` never rising, since nothing comes back.
    """

    name: str
    action: Action
    num_layers: int
    layers: tuple[int, ...]
    keep: tuple[float, ...]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Stage 0 (dense) and one stage per decision layer."""
        edges = itertools.pairwise((0, *self.layers, self.num_layers))
        ratios = (1.0, *self.keep)
        return tuple(
            Stage(first_layer=first, end_layer=end, keep_ratio=ratio)
            for (first, end), ratio in zip(edges, ratios, strict=True)
        )

    @property
    def reroutes(self) -> bool:
        """Whether deferred tokens may come back."""
        return self.action == "reroute"

    @property
    def ratios(self) -> tuple[float, ...]:
        """Distinct keep ratios in order of first use; each is one KV cache group."""
        return tuple(dict.fromkeys(stage.keep_ratio for stage in self.stages))

    def keep_ratio_of(self, layer: int) -> float:
        """Keep ratio of the stage that decoder layer `layer` belongs to."""
        return next(s.keep_ratio for s in self.stages if s.first_layer <= layer < s.end_layer)

    def layers_with(self, keep_ratio: float) -> list[int]:
        """Decoder layers, ascending, that run with `keep_ratio`."""
        return [
            layer
            for stage in self.stages
            if stage.keep_ratio == keep_ratio
            for layer in range(stage.first_layer, stage.end_layer)
        ]

    def kept_per_stage(self, num_visual: int = REFERENCE_VISUAL_TOKENS) -> list[int]:
        """Visual tokens of a request with `num_visual` that run in each stage."""
        return [num_kept(num_visual, stage.keep_ratio) for stage in self.stages]

    def average(self, num_visual: int = REFERENCE_VISUAL_TOKENS) -> float:
        """True average of visual tokens per decoder layer for one request."""
        return average_visual_tokens(self.num_layers, self.layers, self.keep, num_visual)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for `additional_config` (which enters vLLM's compile hash)."""
        return {
            "name": self.name,
            "action": self.action,
            "num_layers": self.num_layers,
            "layers": list(self.layers),
            "keep": list(self.keep),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RoutingSchedule:
        return cls(
            name=fields["name"],
            action=fields["action"],
            num_layers=fields["num_layers"],
            layers=tuple(fields["layers"]),
            keep=tuple(fields["keep"]),
        )

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> RoutingSchedule:
        """The schedule of a routed engine."""
        return cls.from_dict(vllm_config.additional_config[CONFIG_KEY])


def is_routed(vllm_config: VllmConfig) -> bool:
    """Whether this engine routes visual tokens."""
    additional = vllm_config.additional_config
    return isinstance(additional, dict) and additional.get(CONFIG_KEY) is not None
