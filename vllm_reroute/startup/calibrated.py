"""A calibrated schedule in place of the file that names it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_reroute.calibration.file import CalibratedSchedule, ModelIdentity
from vllm_reroute.schedule import RerouteOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def with_calibration(
    options: RerouteOptions, model: str, hf_config: PretrainedConfig
) -> RerouteOptions:
    """The options with the layers, ratios and action of their file; as they are without one.

    Raises ValueError if the file is not for this model.
    """
    if options.file is None:
        return options
    path = Path(options.file)
    calibrated = CalibratedSchedule.read(path)
    calibrated.check_model(path, ModelIdentity.of(model, hf_config))
    return replace(
        options,
        file=None,
        action=calibrated.action,
        layers=calibrated.layers,
        keep=calibrated.keep,
    )
