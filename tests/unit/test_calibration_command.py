"""`vllm-reroute calibrate` from end to end on a tiny model: files, flags, resuming, refusals."""

import json
import re

import pytest

from benchmarks.grounding.calibration_samples import write
from benchmarks.local_model import SHAPES, build_local_model
from benchmarks.local_models import build_family
from vllm_reroute.calibration import recording, run
from vllm_reroute.calibration.file import CalibratedSchedule
from vllm_reroute.calibration.samples import digest_of, read_samples
from vllm_reroute.command_line import main

COUNT = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_local_model(tmp_path_factory.mktemp("models") / "tiny", SHAPES["tiny"])


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return write(tmp_path_factory.mktemp("samples"), "validation", COUNT)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr("vllm_reroute.calibration.confidence.RESOLVES", 3)


def calibrate(model, samples, out, *words):
    given = ["--model", model, "--samples", samples, "--budget", "50%", "--out", out, *words]
    return main(["calibrate", *map(str, given)])


def test_it_writes_what_it_prints(model, samples, tmp_path, capsys):
    out = tmp_path / "calibrated.json"
    assert calibrate(model, samples, out) == 0
    shown = capsys.readouterr().out
    found = CalibratedSchedule.read(out)
    assert found.model.name == "tiny" and found.model.num_layers == 8
    assert found.about["samples"] == {"count": COUNT, "sha256": digest_of(read_samples(samples))}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", found.about["date"])
    assert found.flags in shown and f"--reroute-file {out}" in shown
    assert found.options.resolve(8).average(16) <= 8
    losses = found.about["expected_loss"]
    assert set(losses) == {
        "chosen",
        "fastv reroute",
        "fastv remove",
        "pdrop reroute",
        "pdrop remove",
    }
    assert all(losses["chosen"]["share"] <= each["share"] for each in losses.values())
    for each in losses.values():
        assert f"{each['share']:.1%}" in shown
    assert "half 1" in shown and "half 2" in shown and "nuwa remove" in shown
    assert out.with_suffix(".svg").read_text().startswith("<?xml")


def test_it_goes_on_where_it_was_cut_off(model, samples, tmp_path, capsys, monkeypatch):
    out = tmp_path / "calibrated.json"
    recorded = []
    record = recording.Recorder.record

    def cut_off(self, inputs):
        if len(recorded) == 4:
            raise KeyboardInterrupt
        recorded.append(inputs)
        return record(self, inputs)

    monkeypatch.setattr(recording.Recorder, "record", cut_off)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, samples, out)
    assert not out.exists()
    monkeypatch.setattr(
        recording.Recorder, "record", lambda s, i: (recorded.append(i), record(s, i))[1]
    )
    assert calibrate(model, samples, out) == 0
    assert len(recorded) == COUNT
    first = json.loads(out.read_text())
    # Another budget needs no model at all.
    monkeypatch.setattr(recording, "Recorder", None)
    assert calibrate(model, samples, out, "--budget", "30%", "--no-plot") == 0
    again = json.loads(out.read_text())
    assert again["about"]["samples"] == first["about"]["samples"]
    assert again["about"]["average_visual_tokens"] <= 0.3 * 16


def test_rows_of_another_precision_are_not_mixed_in(model, samples, tmp_path, capsys):
    out = tmp_path / "calibrated.json"
    assert calibrate(model, samples, out, "--no-plot") == 0
    assert calibrate(model, samples, out, "--no-plot", "--dtype", "bfloat16") == 2
    assert "dtype was 'auto', is 'bfloat16'" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["reroute", "remove"])
def test_actions_and_stages(model, samples, tmp_path, capsys, action):
    out = tmp_path / "calibrated.json"
    words = ["--action", action, "--stages", "2", "--monotone", "--no-plot"]
    assert calibrate(model, samples, out, *words) == 0
    found = CalibratedSchedule.read(out)
    assert found.action == action and len(found.layers) <= 2
    assert list(found.keep) == sorted(found.keep, reverse=True)
    assert not out.with_suffix(".svg").exists()


def test_a_decision_waits_for_deepstack(samples, tmp_path, capsys):
    """Qwen3-VL adds features after layers 0 and 1 here: nothing may decide before layer 2."""
    folder = build_family(tmp_path / "qwen3", "qwen3-vl")
    out = tmp_path / "calibrated.json"
    assert calibrate(folder, samples, out, "--no-plot") == 0
    found = CalibratedSchedule.read(out)
    assert found.layers[0] >= 2
    assert calibrate(folder, samples, out, "--budget", "20%") == 2
    assert "layer 2 of 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,shown",
    [
        (["--budget", "10%"], "--budget 10.0% of the visual tokens cannot be met"),
        (["--out", "x.txt"], "must end in .json"),
        (["--out", "none/x.json"], "the folder none is not there"),
        (["--samples", "none.jsonl"], "is not a file"),
    ],
)
def test_a_mistake_is_one_line(model, samples, tmp_path, capsys, words, shown):
    assert calibrate(model, samples, tmp_path / "c.json", "--no-plot", *words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "vllm-reroute:" in line]
    assert len(errors) == 1 and shown in errors[0]


@pytest.mark.parametrize("budget", ["0", "576", "100%", "much", "-3%", "nan"])
def test_argparse_refuses_a_budget_that_is_none(capsys, budget):
    with pytest.raises(SystemExit):
        main(["calibrate", "--model", "m", "--samples", "s", "--out", "o", f"--budget={budget}"])
    assert "--budget" in capsys.readouterr().err


def test_a_budget_is_that_of_the_reference_image(model, samples, tmp_path):
    """288 of 576 tokens and 50 % are one wish."""
    out = tmp_path / "calibrated.json"
    assert calibrate(model, samples, out, "--no-plot") == 0
    as_share = CalibratedSchedule.read(out)
    assert calibrate(model, samples, out, "--no-plot", "--budget", "288") == 0
    assert CalibratedSchedule.read(out).layers == as_share.layers


@pytest.mark.parametrize(
    "missing,words,shown",
    [
        ("matplotlib", [], r"vllm-reroute\[calibrate\].*--no-plot"),
        ("tqdm", ["--no-plot"], r"vllm-reroute\[calibrate\]"),
    ],
)
def test_extras_are_asked_for_before_anything_runs(
    model, samples, tmp_path, capsys, monkeypatch, missing, words, shown
):
    monkeypatch.setattr(
        run.importlib.util, "find_spec", lambda name: None if name == missing else True
    )
    assert calibrate(model, samples, tmp_path / "c.json", *words) == 2
    assert re.search(shown, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
