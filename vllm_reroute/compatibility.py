"""What routing cannot be combined with: refused at start, each with a cure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs


def check_vllm() -> None:
    pass


def check_arguments(engine_args: EngineArgs) -> None:
    pass


def check_config(vllm_config: VllmConfig) -> None:
    pass
