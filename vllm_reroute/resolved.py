"""What vLLM's configuration holds once an engine is built, in the types it then has.

Its fields are declared as what a user may write, such as "auto".
"""

from __future__ import annotations

import torch
from vllm.config import VllmConfig


def dtype_of(vllm_config: VllmConfig) -> torch.dtype:
    """Of weights and activations."""
    dtype = vllm_config.model_config.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def device_of(vllm_config: VllmConfig) -> torch.device:
    """The kind of device, without an index."""
    device = vllm_config.device_config.device
    assert isinstance(device, torch.device)
    return device
