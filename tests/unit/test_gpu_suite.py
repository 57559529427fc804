"""`make gpu`: what it runs, where, and what its report says."""

import json
import shutil
import sys

import pytest

from benchmarks.gpu import __main__ as suite
from benchmarks.gpu.plan import STEPS, Step, chosen
from benchmarks.gpu.report import TRIAL, markdown, write_report
from benchmarks.gpu.timing import spread_ms


def test_steps_are_chosen_by_how_they_begin():
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert chosen([]) == STEPS
    assert [s.name for s in chosen(["kernels", "profile"])] == [
        "kernels",
        "profile-dense",
        "profile-pdrop-64",
    ]
    with pytest.raises(
        ValueError, match=r"--only kernel5: no step begins so\. Choose of: environment"
    ):
        chosen(["kernels", "kernel5"])


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_trial_is_for_machines_without_a_gpu_only(monkeypatch, has_gpu):
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/nvidia-smi" if has_gpu else None)
    suite.check_machine(trial=not has_gpu)
    with pytest.raises(ValueError, match="Leave it out" if has_gpu else "add --trial"):
        suite.check_machine(trial=has_gpu)


def test_every_step_has_a_module_that_knows_its_words(tmp_path, monkeypatch):
    """A step that ends early keeps what it reached, and one that hangs is ended."""
    script = tmp_path / "stand_in.py"
    script.write_text(
        "import sys, pathlib, time, json\n"
        "words = sys.argv[1:]\n"
        "record = pathlib.Path(words[words.index('--record') + 1])\n"
        "record.parent.mkdir(exist_ok=True)\n"
        "record.write_text(json.dumps({'words': words, 'trial': True, 'passed': None}))\n"
        "time.sleep(0 if '--quick' in words else 60)\n"
    )
    started = suite.subprocess.Popen

    def stand_in(command, **options):
        assert command[:2] == [sys.executable, "-m"]
        return started([sys.executable, str(script), *command[3:]], **options)

    monkeypatch.setattr(suite.subprocess, "Popen", stand_in)
    quick = Step(name="speed-dense", module="speed", words="--quick", limit_s=30, about="")
    assert suite.run(quick, tmp_path, trial=True) == "passed"
    words = json.loads((tmp_path / "records/speed-dense.json").read_text())["words"]
    assert words[0] == "--quick" and words[-1] == "--trial"
    slow = Step(name="kernels", module="kernels", limit_s=2, about="")
    assert suite.run(slow, tmp_path, trial=False) == "ended after 2 s"
    write_report(tmp_path)
    assert list(json.loads((tmp_path / "gpu.json").read_text())) == ["kernels", "speed-dense"]
    assert TRIAL in (tmp_path / "gpu.md").read_text()


def test_the_report_says_what_is_right_and_how_fast():
    records = {
        "environment": {
            "passed": True,
            "trial": False,
            "card": "A CARD",
            "versions": {"vllm": "1"},
        },
        "oracle-fp32": {"passed": False, "trial": False, "tokens_equal": False, "error": "Trace"},
        "speed-dense": {
            "passed": True,
            "trial": False,
            "first_token_image_ms": spread_ms([0.010, 0.011, 0.030]),
            "decode_step_1_ms": 7.5,
        },
        "profile-dense": {"passed": None, "trial": False},
    }
    text = markdown(records)
    assert "- card: A CARD" in text and "- vllm: 1" in text and TRIAL not in text
    assert "| oracle-fp32 |  | **failed** | tokens equal False |" in text
    assert "| profile-dense |  | **not finished** |" in text
    assert "| speed-dense | 11 |  | 7.5 |" in text
    assert "## oracle-fp32\n\n```\nTrace\n```" in text
