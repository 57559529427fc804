"""vLLM's engine arguments: the reroute flags, and the engine configuration they lead to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from vllm_reroute.families.short_names import resolve_model
from vllm_reroute.schedule import CONFIG_KEY, RerouteOptions
from vllm_reroute.startup.flags import add_reroute_flags, fold_flags_when_parsed
from vllm_reroute.vllm_seams.hook import Hook


def _add_cli_args(original: Callable[..., Any], parser: argparse.ArgumentParser) -> Any:
    return fold_flags_when_parsed(add_reroute_flags(original(parser)))


def _create_engine_config(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    given = (self.additional_config or {}).get(CONFIG_KEY)
    if given is None:
        return original(self, *args, **kwargs)
    options = RerouteOptions.from_mapping(given)
    self.model = resolve_model(self.model)
    if not options.active:
        self.additional_config = {
            k: v for k, v in self.additional_config.items() if k != CONFIG_KEY
        }
        return original(self, *args, **kwargs)

    from vllm_reroute.startup.engine_config import configure_routing, request_routing

    with request_routing(self, options):
        vllm_config = original(self, *args, **kwargs)
    return configure_routing(vllm_config, options)


def _hook(method: str, parameters: tuple[str, ...], wrapper: Callable[..., Any]) -> Hook:
    return Hook(
        name=f"engine_args_{method}",
        module="vllm.engine.arg_utils",
        qualname=f"EngineArgs.{method}",
        parameters=parameters,
        wrapper=wrapper,
    )


ENGINE_ARGS = (
    _hook("add_cli_args", ("parser",), _add_cli_args),
    _hook("create_engine_config", ("self", "usage_context", "headless"), _create_engine_config),
)
