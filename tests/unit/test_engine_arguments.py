"""The table of engine arguments in docs/ is complete, and says what the code does."""

import dataclasses
import re
from pathlib import Path

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs

from vllm_reroute.startup.refusals import REFUSALS

ROOT = Path(__file__).parents[2]
# A field that came after the first tested version says with which.
ROW = re.compile(
    r"^\| `(\w+)`(?: \((\d+\.\d+)\))? \| (works|neutral|refused) \| (.+) \|$", flags=re.MULTILINE
)
TEXT = (ROOT / "docs" / "engine-arguments.md").read_text(encoding="utf-8")
ROWS = ROW.findall(TEXT)


def of_kind(kind):
    return {name: said for name, _, found, said in ROWS if found == kind}


def test_every_field_is_decided_once():
    """Fails for a vLLM with other fields: decide each, in docs/engine-arguments.md."""
    series = tuple(int(number) for number in vllm.__version__.split(".")[:2])
    known = [
        name
        for name, since, _, _ in ROWS
        if not since or tuple(int(number) for number in since.split(".")) <= series
    ]
    assert sorted(known) == sorted(f.name for f in dataclasses.fields(AsyncEngineArgs))
    assert len(ROWS) == len(re.findall(r"^\| `", TEXT, flags=re.MULTILINE))


def test_what_is_refused_is_what_the_code_refuses():
    assert of_kind("refused") == {r.option: f"{r.why}; allowed: {r.allowed}" for r in REFUSALS}


def test_what_works_is_used_by_the_test_it_names():
    for name, file in of_kind("works").items():
        used = (ROOT / file.strip("`")).read_text(encoding="utf-8")
        assert re.search(rf"\b{name}\b|--{name.replace('_', '-')}\b", used), (name, file)
