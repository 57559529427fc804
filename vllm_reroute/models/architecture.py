"""How an engine comes to use the routed class of its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm_reroute.families.table import FAMILIES, family_of, nuwa_name, routed_name
from vllm_reroute.nuwa.requirements import check_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class RoutedArchitecture:
    """An `hf_overrides` that applies the user's own, then swaps in the routed architecture.

    nuwa: the one whose vision encoder takes the first decision.
    """

    def __init__(
        self, overrides: Mapping[str, Any] | Callable[..., Any] | None, *, nuwa: bool = False
    ) -> None:
        self.overrides = overrides
        self.nuwa = nuwa

    def __call__(self, config: PretrainedConfig) -> PretrainedConfig:
        """Raises ValueError when the model's architecture cannot be routed."""
        if callable(self.overrides):
            config = self.overrides(config)
        elif self.overrides:
            _update(config, self.overrides)
        # vLLM also calls overrides on an empty config, to look for a changed model type.
        architectures = getattr(config, "architectures", None) or [""]
        if architectures[0]:
            config.architectures = [_routed(architectures[0], nuwa=self.nuwa)]
            if self.nuwa:
                check_model(config)
        return config


def _routed(architecture: str, *, nuwa: bool) -> str:
    family = family_of(architecture)
    if family is None:
        raise ValueError(
            f"--reroute-schedule cannot route the architecture {architecture!r}. Supported: "
            f"{', '.join(sorted(family.architecture for family in FAMILIES))}. Serve this model "
            "without --reroute-schedule."
        )
    return (nuwa_name if nuwa else routed_name)(family.architecture)


def _update(config: PretrainedConfig, overrides: Mapping[str, Any]) -> None:
    for name, value in overrides.items():
        nested: Any = getattr(config, name, None)
        if isinstance(value, Mapping) and hasattr(nested, "update"):
            nested.update(dict(value))
        else:
            config.update({name: value})
