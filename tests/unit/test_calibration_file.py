"""Files of calibrated schedules: what they carry, which model they are for, what options they become."""

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoConfig

from tests.unit.parts import save_model_folder
from vllm_reroute.calibration.file import CalibratedSchedule, ModelIdentity
from vllm_reroute.calibration.rows import NAMES, RowFolder
from vllm_reroute.command_line import main
from vllm_reroute.schedule import CONFIG_KEY, RerouteOptions, RoutingSchedule
from vllm_reroute.startup.calibrated import with_calibration


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model_folder(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture
def config(folder):
    return AutoConfig.from_pretrained(folder)


@pytest.fixture
def written(folder, config, tmp_path):
    path = tmp_path / "calibrated.json"
    made = CalibratedSchedule(
        model=ModelIdentity.of(str(folder), config),
        action="remove",
        layers=(2, 5),
        keep=(0.5, 0.25),
        about={"date": "2026-01-02", "samples": {"count": 4, "sha256": "0" * 64}},
    )
    made.write(path)
    return path


def changed(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return path


def test_a_file_is_read_as_it_was_written(written, folder, config):
    found = CalibratedSchedule.read(written)
    assert (found.action, found.layers, found.keep) == ("remove", (2, 5), (0.5, 0.25))
    assert found.about["samples"]["count"] == 4
    assert found.flags == "--reroute-layers 2,5 --reroute-keep 0.5,0.25 --reroute-action remove"
    found.check_model(written, ModelIdentity.of(str(folder), config))


def test_the_file_takes_the_place_of_layers_and_ratios(written, folder, config):
    options = with_calibration(RerouteOptions(file=str(written)), str(folder), config)
    by_hand = RerouteOptions(layers=(2, 5), keep=(0.5, 0.25), action="remove")
    assert options == by_hand
    random = with_calibration(
        RerouteOptions(file=str(written), scorer="random"), str(folder), config
    )
    assert random == replace(by_hand, scorer="random")
    assert with_calibration(by_hand, "anything", config) is by_hand


def test_what_a_file_cannot_have_is_refused_after_it_is_read(written, folder, config):
    options = RerouteOptions(file=str(written), scorer="accumulated")
    with pytest.raises(ValueError, match="accumulated cannot be combined"):
        with_calibration(options, str(folder), config)


def test_names_of_hub_short_names_and_folders(folder, config):
    def name(model):
        return ModelIdentity.of(model, config).name

    assert name("llava-1.5") == name("llava-hf/llava-1.5-7b-hf") == "llava-1.5-7b-hf"
    assert name(str(folder)) == name(f"{folder}/../tiny-llava/") == "tiny-llava"


def test_a_routed_config_is_the_same_model(folder, config):
    stock = ModelIdentity.of("x", config)
    config.architectures = [f"Reroute{config.architectures[0]}"]
    assert ModelIdentity.of("x", config) == stock


@pytest.mark.parametrize(
    "field,value",
    [
        ("name", "other"),
        ("num_layers", 7),
        ("hidden_size", 1),
        ("num_heads", 1),
        ("architecture", "A"),
    ],
)
def test_another_model_is_refused_with_the_cure(written, folder, config, field, value):
    model = json.loads(written.read_text())["model"]
    served = str(model[field])
    changed(written, model={**model, field: value})
    with pytest.raises(ValueError) as refused:
        with_calibration(RerouteOptions(file=str(written)), str(folder), config)
    shown = str(refused.value)
    assert f"{field} {value!r} is not" in shown and served in shown
    assert "vllm-reroute calibrate" in shown and "--reroute-layers 2,5" in shown


@pytest.mark.parametrize(
    "text,shown",
    [
        ("{", "is not JSON"),
        ("[]", "is not a calibrated schedule"),
        ('{"format": "other"}', "is not a calibrated schedule"),
    ],
)
def test_other_files_are_refused(tmp_path, text, shown):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"--reroute-file .*{shown}.*vllm-reroute calibrate"):
        CalibratedSchedule.read(path)
    with pytest.raises(ValueError, match="cannot be read"):
        CalibratedSchedule.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    "entries,shown",
    [
        ({"layers": [5, 2]}, "strictly increasing"),
        ({"keep": [0.5]}, "one ratio per decision layer"),
        ({"keep": [0.5, 2]}, "outside"),
        ({"action": "drop"}, "is unknown"),
        ({"model": {"name": "x"}}, "damaged"),
        ({"layers": 3}, "damaged"),
    ],
)
def test_damaged_files_are_refused(written, entries, shown):
    with pytest.raises(ValueError, match=shown):
        CalibratedSchedule.read(changed(written, **entries))


@pytest.mark.parametrize(
    "other", [{"schedule": "pdrop"}, {"tier": 64}, {"budget": 90}, {"action": "remove"},
              {"variant": "A"}, {"layers": (2,), "keep": (0.5,)}],
)  # fmt: skip
def test_a_file_says_everything(other):
    with pytest.raises(ValueError, match=r"has no meaning with --reroute-file x\.json"):
        RerouteOptions(file="x.json", **other)
    with pytest.raises(ValueError, match="must be a path"):
        RerouteOptions(file=3)


def test_an_engine_config_of_a_file_is_that_of_its_flags(engine_config, model_folder, tmp_path):
    identity = ModelIdentity.of(str(model_folder), AutoConfig.from_pretrained(model_folder))
    path = tmp_path / "c.json"
    CalibratedSchedule(
        model=identity, action="reroute", layers=(2, 5), keep=(0.5, 0.7), about={}
    ).write(path)
    of_file = engine_config(additional_config={CONFIG_KEY: {"file": str(path)}})
    by_hand = {"action": "reroute", "layers": [2, 5], "keep": [0.5, 0.7]}
    of_flags = engine_config(additional_config={CONFIG_KEY: by_hand})
    assert of_file.additional_config == of_flags.additional_config
    assert RoutingSchedule.of(of_file).layers == (2, 5)
    assert of_file.model_config.architectures == of_flags.model_config.architectures
    changed(path, model={**json.loads(path.read_text())["model"], "num_layers": 40})
    with pytest.raises(ValueError, match="num_layers 40 is not 8"):
        engine_config(additional_config={CONFIG_KEY: {"file": str(path)}})


def test_plan_reads_the_file(written, folder, capsys):
    assert main(["plan", "--model", str(folder), "--reroute-file", str(written)]) == 0
    shown = capsys.readouterr().out
    assert "decision layers   2, 5 of 8" in shown and "action remove" in shown


ROWS = {name: np.ones((2, 3), np.float32) for name in NAMES}


def test_rows_come_back_for_the_same_model_only(tmp_path):
    folder = RowFolder(tmp_path / "rows", {"name": "a", "dtype": "float32"})
    assert folder.load("f" * 64) is None
    folder.save("f" * 64, **ROWS)
    again = RowFolder(tmp_path / "rows", {"name": "a", "dtype": "float32"})
    assert (again.load("f" * 64)["change"] == 1).all() and again.load("e" * 64) is None
    with pytest.raises(ValueError, match=r"name was 'a', is 'b'.*Remove that folder"):
        RowFolder(tmp_path / "rows", {"name": "b", "dtype": "float32"})


def test_a_damaged_row_is_named(tmp_path):
    folder = RowFolder(tmp_path / "rows", {})
    folder.save("f" * 64, **ROWS)
    (file,) = (tmp_path / "rows").glob("*.npz")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        folder.load("f" * 64)
