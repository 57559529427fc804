"""vLLM's own objects, built small: requests with images, KV cache configs, a model folder."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from benchmarks.local_model import TINY, make_config
from benchmarks.local_tokenizer import image_token_id, make_processor
from vllm_reroute.kv_cache.registration import register_routed_specs
from vllm_reroute.kv_cache.spec import LayeredSpec, ParkedSpec, StageSpec
from vllm_reroute.schedule import RoutingSchedule

VISUAL = TINY.visual_tokens
"""Visual tokens of one image of the model in `model_folder`."""


def feature(
    offset: int,
    length: int,
    is_embed: Sequence[int] | None = None,
    modality: str = "image",
    name: str = "",
):
    """One image whose placeholder is [offset, offset + length); `is_embed` marks what gets an embedding."""
    mask = None if is_embed is None else torch.tensor(is_embed, dtype=torch.bool)
    return MultiModalFeatureSpec(
        data=MultiModalKwargsItem.dummy(),
        modality=modality,
        identifier=name or f"{modality}-at-{offset}-of-{length}",
        mm_position=PlaceholderRange(offset=offset, length=length, is_embed=mask),
    )


@cache
def block_hasher(block_size: int):
    init_none_hash(sha256)
    return get_request_block_hasher(block_size, sha256)


def make_request(
    name: str,
    prompt: int | list[int],
    images: Sequence[MultiModalFeatureSpec] = (),
    *,
    max_tokens: int = 64,
    block_size: int = 16,
) -> Request:
    """A request as the engine core makes it. A prompt of n tokens is 0..n-1 where nobody cares."""
    tokens = list(range(prompt)) if isinstance(prompt, int) else list(prompt)
    for image in images:
        first = image.mm_position.offset
        tokens[first : first + image.mm_position.length] = [
            image_token_id()
        ] * image.mm_position.length
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(
        request_id=name,
        prompt_token_ids=tokens,
        sampling_params=params,
        pooling_params=None,
        mm_features=list(images),
        block_hasher=block_hasher(block_size),
    )


def layer_specs(
    schedule: RoutingSchedule,
    *,
    block_size: int = 16,
    kv_heads: int = 1,
    head_size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    parked_pages: int = 2,
) -> dict[str, LayeredSpec]:
    """What a worker reports: one spec per stage, under the name of its first layer, and the parked
    states' own."""
    register_routed_specs()
    shape = {
        "block_size": block_size,
        "num_kv_heads": kv_heads,
        "head_size": head_size,
        "dtype": dtype,
    }
    specs: dict[str, LayeredSpec] = {
        f"layers.{stage.first_layer}.attn": StageSpec(
            stage=index, num_layers=stage.num_layers, **shape
        )
        for index, stage in enumerate(schedule.stages)
    }
    specs[f"layers.{schedule.num_layers}.parked"] = ParkedSpec(num_layers=parked_pages, **shape)
    return specs


def kv_cache_config(schedule: RoutingSchedule, num_blocks: int, **shape: object) -> KVCacheConfig:
    """The groups vLLM makes of `layer_specs` (test_kv_groups.py), over a pool of `num_blocks`."""
    groups = [
        KVCacheGroupSpec([name], spec) for name, spec in layer_specs(schedule, **shape).items()
    ]
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def save_model_folder(folder: Path) -> Path:
    """A LLaVA of 8 layers without weights: what a config and a processor are read from."""
    make_config(TINY).save_pretrained(folder)
    make_processor(TINY.image_size, TINY.patch_size).save_pretrained(folder)
    return folder
