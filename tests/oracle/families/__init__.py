"""What differs between model families, by transformers' model type."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig

from . import llava, llava_next, llava_onevision, qwen2_5_vl, qwen2_vl, qwen3_vl
from .prompt import Prompt


class Family(NamedTuple):
    prepare: Callable[[nn.Module, Mapping[str, Tensor]], Prompt]
    # After how many decoder layers, from the first, features are still added to the visual tokens.
    num_deepstack_levels: Callable[[PreTrainedConfig], int] = lambda config: 0


FAMILIES: dict[str, Family] = {
    "llava": Family(llava.prepare),
    "llava_next": Family(llava_next.prepare),
    "llava_onevision": Family(llava_onevision.prepare),
    "qwen2_vl": Family(qwen2_vl.prepare),
    "qwen2_5_vl": Family(qwen2_5_vl.prepare),
    "qwen3_vl": Family(qwen3_vl.prepare, qwen3_vl.num_deepstack_levels),
}


def family_of(config: PreTrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model type {config.model_type!r} is not covered by the oracle. "
            f"Choose one of: {', '.join(FAMILIES)}."
        )
    return FAMILIES[config.model_type]
