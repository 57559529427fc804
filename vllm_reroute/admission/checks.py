"""What routing cannot answer, and how a client is told."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError

from vllm_reroute.plan.turns import cut_at_markers
from vllm_reroute.plan.visual_spans import VISUAL_MODALITIES, VisualSpans
from vllm_reroute.schedule import RoutingSchedule
from vllm_reroute.schedule.request_options import KEY, RequestOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest

_SERVE_STOCK = "or serve without --reroute-schedule"


def check_request(request: EngineCoreRequest, vllm_config: VllmConfig) -> None:
    """Refuse reroute options that make no sense, and an image request that could not be answered.

    Raises VLLMValidationError, which the API server answers with HTTP 400.
    """
    extra_args = getattr(request.sampling_params, "extra_args", None)
    schedule = check_options(extra_args, RoutingSchedule.of(vllm_config))
    features = request.mm_features or ()
    spans = VisualSpans.of(features)
    if spans is None:
        return
    num_prompt = len(request.prompt_token_ids or ())
    if schedule.encoder_ratio is not None:
        check_images_only({feature.modality for feature in features})
    check_text_follows(spans.end, num_prompt)
    check_turns(spans, request.prompt_token_ids or (), schedule)
    if request.resumable:
        raise VLLMValidationError(
            "Streamed input with images is not available under visual-token routing: a decision "
            f"needs the whole prompt. Send the prompt in one piece, {_SERVE_STOCK}.",
            parameter="prompt",
            value=num_prompt,
        )
    check_asked(request.sampling_params)


def check_options(
    extra_args: Mapping[str, Any] | None, schedule: RoutingSchedule
) -> RoutingSchedule:
    """The engine's schedule as a request has it; refuse options that cannot be honoured.

    extra_args: the request's.
    """
    try:
        options = RequestOptions.of(extra_args)
        return schedule if options is None else options.applied(schedule)
    except ValueError as error:
        given = {n: value for n, value in (extra_args or {}).items() if n.startswith(KEY)}
        raise VLLMValidationError(str(error), parameter=", ".join(given), value=given) from error


def check_can_tell(request: Any, extra_args: Mapping[str, Any] | None) -> None:
    """Refuse to explain decisions in an answer that has no room for it.

    request: of the HTTP API, whose options are in order.
    """
    options = RequestOptions.of(extra_args)
    if options is None or not options.explain:
        return
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    whole = isinstance(request, ChatCompletionRequest) and not request.stream
    if not whole:
        raise VLLMValidationError(
            f"reroute_explain {options.explain!r} cannot be answered here: in vLLM's API only chat "
            "completions that are not streamed have a field for it. Leave stream out and ask "
            "/v1/chat/completions, or leave reroute_explain out.",
            parameter="reroute_explain",
            value=options.explain,
        )


def has_images(modalities: Collection[str]) -> bool:
    """Whether a prompt with these modalities has visual tokens."""
    return any(modality in VISUAL_MODALITIES for modality in modalities)


def check_asked(request: Any) -> None:
    """Refuse what no prompt with images can be asked for.

    request: sampling parameters, or a request of the HTTP API, whose own words the error repeats.
    """
    if getattr(request, "use_beam_search", False):
        refuse_beam_search()
    for name in ("prompt_logprobs", "prompt_logprob_token_ids"):
        if getattr(request, name, None) is not None:
            _refuse_prompt_logprobs(name, getattr(request, name))
    if getattr(request, "echo", False) and getattr(request, "top_logprobs", None) is not None:
        _refuse_prompt_logprobs("echo", True)


def _refuse_prompt_logprobs(name: str, value: Any) -> None:
    asks = " asks for log-probabilities of the prompt, which" if name == "echo" else ""
    raise VLLMValidationError(
        f"{name}{asks} is not available for prompts with images under visual-token routing: "
        f"deferred tokens have no final hidden state. Leave {name} out, {_SERVE_STOCK}.",
        parameter=name,
        value=value,
    )


def refuse_beam_search() -> None:
    """Raises VLLMValidationError: vLLM's beam search cannot be routed."""
    raise VLLMValidationError(
        "Beam search is not available for prompts with images under visual-token routing: vLLM "
        "sends prompt and answer again as a prompt for every token, and each time tokens would be "
        f"chosen anew. Leave use_beam_search out (n > 1 works), {_SERVE_STOCK}.",
        parameter="use_beam_search",
        value=True,
    )


def check_text_follows(end: int, num_prompt: int) -> None:
    """Refuse a prompt whose last token is visual. end: one past the last visual token."""
    if end >= num_prompt:
        raise VLLMValidationError(
            "The prompt ends with an image. Visual-token routing scores images by the prompt's last "
            "token, which must be text. Put the question after the image, or add any text there.",
            parameter="prompt",
            value=num_prompt,
        )


def check_turns(
    spans: VisualSpans | None, prompt: Sequence[int], schedule: RoutingSchedule
) -> None:
    """Refuse a request that keeps its turns, but does not end the one with its last picture.

    schedule: as the request has it.
    """
    if spans is None or not schedule.keeps_turns:
        return
    try:
        cut_at_markers(spans, prompt, schedule.marker)
    except ValueError as error:
        raise VLLMValidationError(
            f"The prompt has {error}: with --reroute-history {schedule.history} the question that comes with a "
            "picture ranks it, and ends where the prompt asks the assistant to speak. End the prompt "
            "with the chat template's generation prompt (add_generation_prompt), start the server "
            "with --reroute-turn-marker and the text this format uses, or ask for reroute_history "
            "'rerank'.",
            parameter="prompt",
            value=len(prompt),
        ) from error


def check_images_only(modalities: Collection[str]) -> None:
    """Refuse videos, for schedules whose first decision is the vision encoder's."""
    if "video" in modalities:
        raise VLLMValidationError(
            "Videos are not available under --reroute-schedule nuwa: its first decision ranks the "
            "patches of single images. Send frames as images, or serve with another schedule.",
            parameter="video",
        )
