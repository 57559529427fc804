"""`vllm-reroute doctor` says what fits and what does not."""

import pytest
import torch
import transformers

from vllm_reroute import __version__
from vllm_reroute.command_line import main
from vllm_reroute.registry import Registry
from vllm_reroute.vllm_seams import seams


def test_what_fits_is_said(capsys, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for part in (
        f"vllm-reroute {__version__}",
        f"torch {torch.__version__.partition('+')[0]}",
        f"transformers {transformers.__version__}",
        "device: ",
        f"all {len(seams.SEAMS)} private parts",
    ):
        assert part in said


@pytest.mark.parametrize("case", ["plugins", "version", "seam", "schedule"])
def test_what_does_not_fit_is_named_with_a_cure(capsys, monkeypatch, case):
    if case == "plugins":
        monkeypatch.setenv("VLLM_PLUGINS", "other")
        named = "VLLM_PLUGINS=other"
    elif case == "version":
        monkeypatch.setattr("vllm.__version__", "0.7.1")
        named = "vLLM 0.7.1 is not tested"
    elif case == "schedule":
        broken = Registry("schedule", "nobody.s", {"mine": "no_such_module:MADE"}, problem=str)
        monkeypatch.setattr("vllm_reroute.command_line.doctor.KINDS", (broken,))
        named = "The schedule 'mine' of"
    else:
        gone = seams.Seam("vllm.v1.core.block_pool", "BlockPool.no_such_part", ("self",))
        monkeypatch.setattr(seams, "SEAMS", (gone,))
        named = "BlockPool.no_such_part is gone"
    assert main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert f"PROBLEM: {named}" in said or f"PROBLEM: vllm.v1.core.block_pool.{named}" in said
    assert f"vllm-reroute {__version__}" in said


def test_the_version_stands_once(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == f"vllm-reroute {__version__}"
