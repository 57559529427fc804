"""Every model family that can be routed: the one table other code and the documentation read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """One stock architecture of vLLM and the class that routes it.

    model_class: `module:class`, imported by vLLM only when it is used. nuwa_class: the same for
    the schedule `nuwa`, None where the family's vision tower is not supported. short_names: short name ->
    Hugging Face id of common public checkpoints. tested: what the engine tests compare with the
    oracle. fixed_grid: whether every image takes the same number of visual tokens.
    """

    title: str
    architecture: str
    model_class: str
    short_names: Mapping[str, str]
    tested: str
    fixed_grid: bool = False
    nuwa_class: str | None = None


FAMILIES = (
    Family(
        title="LLaVA-1.5",
        architecture="LlavaForConditionalGeneration",
        model_class="vllm_reroute.models.llava:RerouteLlavaForConditionalGeneration",
        short_names={
            "llava-1.5": "llava-hf/llava-1.5-7b-hf",
            "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
            "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
        },
        tested="images; Llama, Mistral and Qwen2 decoders; image embeddings; int8 weights; nuwa",
        fixed_grid=True,
        nuwa_class="vllm_reroute.models.llava_nuwa:RerouteNuwaLlavaForConditionalGeneration",
    ),
    Family(
        title="LLaVA-NeXT (1.6)",
        architecture="LlavaNextForConditionalGeneration",
        model_class="vllm_reroute.models.llava_next:RerouteLlavaNextForConditionalGeneration",
        short_names={
            "llava-next": "llava-hf/llava-v1.6-mistral-7b-hf",
            "llava-next-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
            "llava-next-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
            "llava-next-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
            "llava-next-34b": "llava-hf/llava-v1.6-34b-hf",
        },
        tested="images of several sizes; Mistral decoder",
    ),
    Family(
        title="LLaVA-OneVision",
        architecture="LlavaOnevisionForConditionalGeneration",
        model_class=(
            "vllm_reroute.models.llava_onevision:RerouteLlavaOnevisionForConditionalGeneration"
        ),
        short_names={
            "llava-onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
            "llava-onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
            "llava-onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
            "llava-onevision-72b": "llava-hf/llava-onevision-qwen2-72b-ov-hf",
        },
        tested="images of several sizes, videos; Qwen2 decoder",
    ),
    Family(
        title="Qwen2-VL",
        architecture="Qwen2VLForConditionalGeneration",
        model_class="vllm_reroute.models.qwen2_vl:RerouteQwen2VLForConditionalGeneration",
        short_names={
            "qwen2-vl": "Qwen/Qwen2-VL-7B-Instruct",
            "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct",
            "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct",
            "qwen2-vl-72b": "Qwen/Qwen2-VL-72B-Instruct",
        },
        tested="images of several sizes, videos; M-RoPE",
    ),
    Family(
        title="Qwen2.5-VL",
        architecture="Qwen2_5_VLForConditionalGeneration",
        model_class="vllm_reroute.models.qwen2_5_vl:RerouteQwen2_5_VLForConditionalGeneration",
        short_names={
            "qwen2.5-vl": "Qwen/Qwen2.5-VL-7B-Instruct",
            "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
            "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
            "qwen2.5-vl-32b": "Qwen/Qwen2.5-VL-32B-Instruct",
            "qwen2.5-vl-72b": "Qwen/Qwen2.5-VL-72B-Instruct",
        },
        tested="images of several sizes, videos; M-RoPE; image embeddings; nuwa",
        nuwa_class=(
            "vllm_reroute.models.qwen2_5_vl_nuwa:RerouteNuwaQwen2_5_VLForConditionalGeneration"
        ),
    ),
    Family(
        title="Qwen3-VL",
        architecture="Qwen3VLForConditionalGeneration",
        model_class="vllm_reroute.models.qwen3_vl:RerouteQwen3VLForConditionalGeneration",
        short_names={
            "qwen3-vl": "Qwen/Qwen3-VL-8B-Instruct",
            "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
            "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
            "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
            "qwen3-vl-32b": "Qwen/Qwen3-VL-32B-Instruct",
        },
        tested="images of several sizes, videos; M-RoPE, q/k norms, deepstack",
    ),
)


def routed_name(architecture: str) -> str:
    """Name under which the routed class of a stock architecture is registered."""
    return f"Reroute{architecture}"


def nuwa_name(architecture: str) -> str:
    """The same for the class whose vision encoder takes the first decision."""
    return f"RerouteNuwa{architecture}"


def family_of(architecture: str) -> Family | None:
    """The family of an architecture, given by its stock or one of its routed names."""
    for family in FAMILIES:
        stock = family.architecture
        if architecture in (stock, routed_name(stock), nuwa_name(stock)):
            return family
    return None
