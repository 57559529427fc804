"""The resolved routing schedule every process of an engine reads."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm_reroute.schedule.budget import (
    REFERENCE_VISUAL_TOKENS,
    average_visual_tokens,
    num_kept_of_images,
)
from vllm_reroute.schedule.published import Action, History, Variant

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_KEY = "reroute"
"""Key of the options a user gave in `VllmConfig.additional_config`."""

SCHEDULE_KEY = "reroute_schedule"
"""Key of the schedule resolved from them, set by this package alone."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Decoder layers between two decisions.

    first_layer: inclusive; the decision layer, or 0 for a dense first stage.
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
class Decision:
    """One choice of visual tokens.

    layer: the choice runs from this decoder layer on. scored_at: the layer whose input the scores
    come from; None if the vision encoder has decided. keep_ratio: as in `Stage`.
    removes: whether tokens not kept are gone for good.
    """

    layer: int
    scored_at: int | None
    keep_ratio: float
    removes: bool


@dataclass(frozen=True, kw_only=True)
class RoutingSchedule:
    """What to route where, complete and checked before the engine starts.

    name: one of `SCHEDULES`, or `custom`. num_layers: decoder layers of the model.
    layers: decision layers, strictly increasing, in [0, num_layers). A decision at 0 is the vision
    encoder's: there is no dense stage then.
    keep: one ratio per decision layer; for `remove` never rising, since nothing comes back.
    variant: of a `reroute` schedule whose first decision is the vision encoder's; None otherwise.
    scorer: what ranks visual tokens in the decoder, one of `SCORERS`. history: what becomes of earlier turns' pictures.
    marker: token ids with which a prompt asks the assistant to speak; empty where nobody needs them.
    """

    name: str
    action: Action
    num_layers: int
    layers: tuple[int, ...]
    keep: tuple[float, ...]
    variant: Variant | None = None
    scorer: str = "attention"
    history: History = "rerank"
    marker: tuple[int, ...] = ()

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """One stage per decision layer, after a dense one unless the vision encoder decides."""
        dense = self.encoder_ratio is None
        edges = itertools.pairwise(((0,) * dense) + (*self.layers, self.num_layers))
        ratios = (1.0,) * dense + self.keep
        return tuple(
            Stage(first_layer=first, end_layer=end, keep_ratio=ratio)
            for (first, end), ratio in zip(edges, ratios, strict=True)
        )

    @property
    def boundary(self) -> int:
        """The first decision layer: from its input on, tokens may be deferred."""
        return self.layers[0]

    @cached_property
    def pieces(self) -> tuple[Stage, ...]:
        """The stages, cut once more where the input of a layer inside one is scored."""
        edges = {0, self.num_layers, *self.layers, *(d.scored_at or 0 for d in self.decisions)}
        return tuple(
            Stage(
                first_layer=first,
                end_layer=end,
                keep_ratio=self.stages[self.stage_of(first)].keep_ratio,
            )
            for first, end in itertools.pairwise(sorted(edges))
        )

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """All choices, in order.

        Nüwa with `remove` scores by the layer before the one it decides for, as its authors do.
        With `reroute` that layer has not seen the deferred tokens: the deciding layer scores.
        """
        lag = int(self.encoder_ratio is not None and not self.reroutes)
        return tuple(
            Decision(
                layer=layer,
                scored_at=layer - lag if layer else None,
                keep_ratio=ratio,
                removes=not self.reroutes or (layer == 0 and self.variant == "A"),
            )
            for layer, ratio in zip(self.layers, self.keep, strict=True)
        )

    @property
    def encoder_ratio(self) -> float | None:
        """Share of an image's tokens that the vision encoder's decision keeps; None without one."""
        return self.keep[0] if self.layers[0] == 0 else None

    @property
    def reroutes(self) -> bool:
        """Whether deferred tokens may come back."""
        return self.action == "reroute"

    @cached_property
    def chosen_at(self) -> Mapping[int, Decision]:
        """The decision that is taken at a layer's input, by layer."""
        return {decision.layer: decision for decision in self.decisions}

    @cached_property
    def scored_at(self) -> Mapping[int, Decision]:
        """The decision whose scores come from a layer's input, by layer."""
        return {d.scored_at: d for d in self.decisions if d.scored_at is not None}

    def stage_of(self, layer: int) -> int:
        """Index of the stage that decoder layer `layer` belongs to; each is one KV cache group."""
        return self._stage_of_layer[layer]

    @cached_property
    def _stage_of_layer(self) -> tuple[int, ...]:
        return tuple(i for i, stage in enumerate(self.stages) for _ in range(stage.num_layers))

    @property
    def keeps_turns(self) -> bool:
        """Whether what finished turns have kept stays."""
        return self.history != "rerank"

    @property
    def recalls(self) -> bool:
        """Whether later questions also bring back what earlier ones have deferred."""
        return self.history == "recall"

    def kept_per_stage(self, *image_sizes: int) -> list[int]:
        """Visual tokens that run in each stage, of a request with images of these sizes."""
        sizes = image_sizes or (REFERENCE_VISUAL_TOKENS,)
        return [
            num_kept_of_images(sizes, stage.keep_ratio, self.encoder_ratio) for stage in self.stages
        ]

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
            "variant": self.variant,
            "scorer": self.scorer,
            "history": self.history,
            "marker": list(self.marker),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RoutingSchedule:
        return cls(
            name=fields["name"],
            action=fields["action"],
            num_layers=fields["num_layers"],
            layers=tuple(fields["layers"]),
            keep=tuple(fields["keep"]),
            variant=fields["variant"],
            scorer=fields["scorer"],
            history=fields["history"],
            marker=tuple(fields["marker"]),
        )

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> RoutingSchedule:
        """The schedule of a routed engine."""
        assert isinstance(vllm_config.additional_config, dict)
        return cls.from_dict(vllm_config.additional_config[SCHEDULE_KEY])


def is_routed(vllm_config: VllmConfig) -> bool:
    """Whether this engine routes visual tokens."""
    additional = vllm_config.additional_config
    return isinstance(additional, dict) and additional.get(SCHEDULE_KEY) is not None
