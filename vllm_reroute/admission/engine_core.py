"""The engine core's own check, for requests that passed a front end without any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_reroute.schedule import is_routed
from vllm_reroute.vllm_seams.hook import Hook


def _preprocess_add_request(
    original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """vLLM finishes a request with an error if this raises, and goes on."""
    added = original(self, request, *args, **kwargs)
    if is_routed(self.vllm_config):
        from vllm_reroute.admission.checks import check_request

        # After the original: pictures it brought must be known to the engine all the same.
        check_request(request, self.vllm_config)
    return added


ENGINE_CORE = Hook(
    name="engine_core_preprocess_add_request",
    module="vllm.v1.engine.core",
    qualname="EngineCore.preprocess_add_request",
    parameters=("self", "request"),
    wrapper=_preprocess_add_request,
)
