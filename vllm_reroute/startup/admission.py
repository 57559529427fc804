"""Which requests a routed engine accepts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError

from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.schedule import RoutingSchedule

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest


def check_request(request: EngineCoreRequest, vllm_config: VllmConfig) -> None:
    """Refuse an image request that could never be scheduled or fully answered.

    Raises VLLMValidationError, which the API server answers with HTTP 400.
    """
    spans = VisualSpans.of(request.mm_features or ())
    if spans is None:
        return
    num_prompt = len(request.prompt_token_ids or ())
    if RoutingSchedule.of(vllm_config).encoder_ratio is not None:
        _check_images_only(request)
    if spans.end >= num_prompt:
        raise VLLMValidationError(
            "The prompt ends with an image. Visual-token routing scores images by the prompt's last "
            "token, which must be text. Put the question after the image, or add any text there.",
            parameter="prompt",
            value=num_prompt,
        )
    if request.resumable:
        raise VLLMValidationError(
            "Streamed input with images is not available under visual-token routing: a decision "
            "needs the whole prompt. Send the prompt in one piece, or serve without "
            "--reroute-schedule.",
            parameter="prompt",
            value=num_prompt,
        )
    for name in ("prompt_logprobs", "prompt_logprob_token_ids"):
        if getattr(request.sampling_params, name, None) is not None:
            raise VLLMValidationError(
                f"{name} is not available for prompts with images under visual-token routing: "
                f"deferred tokens have no final hidden state. Leave {name} out, or serve without "
                "--reroute-schedule.",
                parameter=name,
                value=getattr(request.sampling_params, name),
            )


def _check_images_only(request: EngineCoreRequest) -> None:
    if any(feature.modality == "video" for feature in request.mm_features or ()):
        raise VLLMValidationError(
            "Videos are not available under --reroute-schedule nuwa: its first decision ranks the "
            "patches of single images. Send frames as images, or serve with another schedule.",
            parameter="video",
        )
