"""Where a front end hears what a request asks for: refused with an error the client sees (HTTP 400)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_reroute.metrics.stat_logger import STAT_LOGGERS
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.schedule import RoutingSchedule, is_routed
from vllm_reroute.vllm_seams.hook import Hook


def _process_inputs(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The last check of a front end, of everything: after it the request is sent."""
    request = original(self, *args, **kwargs)
    if is_routed(self.vllm_config):
        from vllm_reroute.admission.checks import check_request
        from vllm_reroute.admission.sent_pictures import SentPictures

        check_request(request, self.vllm_config)
        sent = SentPictures.of(self.renderer.mm_processor_cache)
        if sent is not None:
            sent.mark(request.mm_features or ())
    return request


async def _preprocess_chat(
    original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """Before a stream starts, and in the words the client used."""
    conversation, engine_inputs = await original(self, request, *args, **kwargs)
    vllm_config = self.renderer.config
    if is_routed(vllm_config):
        from vllm_reroute.admission.checks import (
            check_asked,
            check_can_tell,
            check_options,
            check_turns,
            has_images,
        )

        extra_args = getattr(request, "vllm_xargs", None)
        schedule = check_options(extra_args, RoutingSchedule.of(vllm_config))
        check_can_tell(request, extra_args)
        for one in engine_inputs:
            places = one.get("mm_placeholders", {})
            if has_images(places):
                check_asked(request)
                spans = VisualSpans.of_ranges(places)
                check_turns(spans, one["prompt_token_ids"], schedule)
    return conversation, engine_inputs


def _beam_search(
    original: Callable[..., Any], self: Any, prompts: Any, *args: Any, **kwargs: Any
) -> Any:
    """Offline; over HTTP the request says so to `_preprocess_chat`."""
    if is_routed(self.llm_engine.vllm_config):
        from vllm_reroute.admission.checks import has_images, refuse_beam_search

        given = [one.get("multi_modal_data") or () for one in prompts if isinstance(one, dict)]
        if any(has_images(modalities) for modalities in given):
            refuse_beam_search()
    return original(self, prompts, *args, **kwargs)


INPUT_PROCESSOR = Hook(
    name="input_processor_process_inputs",
    module="vllm.v1.engine.input_processor",
    qualname="InputProcessor.process_inputs",
    parameters=("self", "request_id", "prompt", "params"),
    wrapper=_process_inputs,
)

ONLINE_RENDERER = Hook(
    name="online_renderer_preprocess_chat",
    module="vllm.renderers.online_renderer",
    qualname="OnlineRenderer.preprocess_chat",
    parameters=("self", "request", "messages"),
    wrapper=_preprocess_chat,
)

BEAM_SEARCH = Hook(
    name="offline_beam_search",
    module="vllm.entrypoints.generate.beam_search.offline",
    qualname="BeamSearchOfflineMixin.beam_search",
    parameters=("self", "prompts", "params"),
    wrapper=_beam_search,
)

FRONT_END = (INPUT_PROCESSOR, ONLINE_RENDERER, BEAM_SEARCH, STAT_LOGGERS)
