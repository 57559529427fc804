"""Request admission: refuse what routing cannot honour with an error the client sees (HTTP 400)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_reroute.schedule import is_routed
from vllm_reroute.vllm_seams.hook import Hook


def _process_inputs(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(self, *args, **kwargs)
    if is_routed(self.vllm_config):
        from vllm_reroute.startup.admission import check_request

        check_request(request, self.vllm_config)
    return request


INPUT_PROCESSOR = Hook(
    name="input_processor_process_inputs",
    module="vllm.v1.engine.input_processor",
    qualname="InputProcessor.process_inputs",
    parameters=("self", "request_id", "prompt", "params"),
    wrapper=_process_inputs,
)
