"""A calibrated schedule is served as the same layers and ratios given by hand are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.grounding.calibration_samples import write
from tests.engine.conftest import engine_args
from tests.engine.host import EngineHost
from tests.engine.oracle_answers import OracleAnswers
from tests.engine.probes import generate
from tests.engine.requests import MIXED
from vllm_reroute.calibration.file import CalibratedSchedule
from vllm_reroute.command_line import main
from vllm_reroute.schedule import RerouteOptions


@pytest.fixture(scope="module", params=["reroute", "remove"])
def calibrated(
    request: pytest.FixtureRequest,
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    samples, out = write(folder, "validation", 6), folder / "calibrated.json"
    words = ["--model", models["grouped"], "--samples", samples, "--budget", "50%", "--no-plot"]
    words += ["--out", out, "--stages", "3", "--action", request.param]
    assert main(["calibrate", *map(str, words)]) == 0
    return out


def test_the_file_serves_what_its_flags_say(
    v1: EngineHost, models: dict[str, Path], oracles: OracleAnswers, calibrated: Path
) -> None:
    v1.engine(**engine_args(models["grouped"], {"file": str(calibrated)}))
    by_hand = CalibratedSchedule.read(calibrated).options.to_mapping()
    schedule = RerouteOptions.from_mapping(by_hand).resolve(8)
    for ask, answer in zip(MIXED, v1.call(generate, MIXED), strict=True):
        oracles.check("grouped", schedule, ask, answer)


def test_another_model_is_not_served_with_it(
    v1: EngineHost, models: dict[str, Path], calibrated: Path
) -> None:
    options: dict[str, Any] = {"file": str(calibrated)}
    with pytest.raises(ValueError, match=r"name 'grouped' is not 'multi-head'.*--reroute-layers"):
        v1.engine(**engine_args(models["multi-head"], options))
