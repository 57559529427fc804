"""Hooks, ledger and diffs are in step, the diffs fit the installed vLLM, and hooks go in once."""

import ast
import importlib
import inspect
import os
import pkgutil
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import vllm

import vllm_reroute
from vllm_reroute.vllm_seams.hook import Hook
from vllm_reroute.vllm_seams.seams import TESTED_VERSIONS

LEDGER_FOLDER = Path(__file__).parents[2] / "patches"
PATCHES = LEDGER_FOLDER / ".".join(vllm.__version__.split(".")[:2])
LEDGER = tomllib.loads((LEDGER_FOLDER / "ledger.toml").read_text(encoding="utf-8"))
ENTRIES = {entry["name"]: entry for entry in LEDGER["patch"]}
SITE = Path(vllm.__file__).parents[1]


def find_hooks() -> dict[str, Hook]:
    """Every `Hook` that a module of the package holds, alone or in a tuple."""
    found = []
    for info in pkgutil.walk_packages(vllm_reroute.__path__, f"{vllm_reroute.__name__}."):
        for value in vars(importlib.import_module(info.name)).values():
            found += [
                hook
                for hook in (value if isinstance(value, tuple) else (value,))
                if isinstance(hook, Hook)
            ]
    return {hook.name: hook for hook in found}


HOOKS = find_hooks()
every_hook = pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)


def test_hooks_ledger_and_diffs_are_the_same_set():
    for series in TESTED_VERSIONS:
        diffs = {path.stem for path in (LEDGER_FOLDER / series).glob("*.diff")}
        assert set(HOOKS) == set(ENTRIES) == diffs, series
    assert len(LEDGER["patch"]) == len(ENTRIES) == 8


def test_the_ledger_speaks_of_the_tested_versions():
    assert LEDGER["vllm"] == list(TESTED_VERSIONS)


@every_hook
def test_an_entry_is_complete(hook):
    entry = ENTRIES[hook.name]
    assert set(entry) == {
        "name",
        "target",
        "diff",
        "why",
        "how",
        "extension",
        "upstream",
        "delete_when",
    }
    assert all(isinstance(value, str) and value.strip() for value in entry.values())
    assert entry["target"] == f"{hook.module}:{hook.qualname}"
    assert entry["diff"] == f"{hook.name}.diff"
    assert entry["upstream"] == "not proposed yet" or entry["upstream"].startswith(
        "https://github.com/vllm-project/"
    )


@pytest.fixture
def source(tmp_path):
    """A copy of the installed files that diffs name, at the root of nothing else."""

    def copy(*diffs):
        for diff in diffs:
            for path in files_of(diff):
                target = tmp_path / path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(SITE / path, target)
        return tmp_path

    return copy


def files_of(diff: Path) -> list[str]:
    lines = diff.read_text(encoding="utf-8").splitlines()
    before = [line.removeprefix("--- a/") for line in lines if line.startswith("--- ")]
    assert before == [line.removeprefix("+++ b/") for line in lines if line.startswith("+++ ")]
    return before


def apply(diff: Path, folder: Path) -> None:
    # Inside a repository git would skip what lies outside of it, without a word.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(
        ["git", "apply", diff], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def function(text: str, qualname: str) -> str:
    """One method's code, comments and layout left out."""
    owner, name = qualname.split(".")
    (cls,) = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef) and node.name == owner
    ]
    (method,) = [
        node
        for node in cls.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
    ]
    return ast.dump(method)


@every_hook
def test_a_diff_changes_what_its_hook_wraps(hook, source):
    diff = PATCHES / f"{hook.name}.diff"
    (path,) = files_of(diff)
    assert path == f"{hook.module.replace('.', '/')}.py"
    folder = source(diff)
    before = (folder / path).read_text(encoding="utf-8")
    apply(diff, folder)
    after = (folder / path).read_text(encoding="utf-8")
    compile(after, path, "exec")
    assert function(after, hook.qualname) != function(before, hook.qualname)
    assert max(len(line) for line in set(after.splitlines()) - set(before.splitlines())) <= 88, (
        "vLLM's line length"
    )


def test_all_diffs_apply_together(source):
    diffs = [PATCHES / f"{name}.diff" for name in HOOKS]
    folder = source(*diffs)
    for diff in diffs:
        apply(diff, folder)
    for path in {path for diff in diffs for path in files_of(diff)}:
        compile((folder / path).read_text(encoding="utf-8"), path, "exec")


def test_diffs_are_not_in_the_installed_vllm(source):
    """Once one is, its hook is no longer needed: delete both, and the entry."""
    for name in HOOKS:
        diff = PATCHES / f"{name}.diff"
        folder = source(diff)
        reverse = ["git", "apply", "--check", "--reverse", diff]
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
        assert (
            subprocess.run(reverse, cwd=folder, env=environment, capture_output=True).returncode
            != 0
        ), name


@every_hook
def test_a_hook_goes_in_once(hook, monkeypatch):
    owner_name, _, attribute = hook.qualname.rpartition(".")
    owner = getattr(importlib.import_module(hook.module), owner_name)
    declared = inspect.getattr_static(owner, attribute)
    kind = type(declared) if isinstance(declared, staticmethod | classmethod) else None
    plain = inspect.unwrap(declared.__func__ if kind else declared)
    monkeypatch.setattr(owner, attribute, kind(plain) if kind else plain)

    hook.install()
    installed = inspect.getattr_static(owner, attribute)
    hook.install()
    assert inspect.getattr_static(owner, attribute) is installed
    assert type(installed) is (kind or type(plain))
    wrapped = installed.__func__ if kind else installed
    assert wrapped is not plain and wrapped.__wrapped__ is plain
    assert inspect.signature(wrapped) == inspect.signature(plain), (
        "tools still see vLLM's parameters"
    )


@pytest.fixture
def toy(monkeypatch):
    """A module to hook that is not vLLM's."""

    class Engine:
        @staticmethod
        def plain(value):
            return value

        @classmethod
        def made(cls, value):
            return cls, value

        def run(self, value):
            return self, value

    module = ModuleType("toy_engine")
    module.Engine = Engine
    monkeypatch.setitem(sys.modules, "toy_engine", module)
    return Engine


def toy_hook(method, *parameters, name="toy"):
    def wrapper(original, *args, **kwargs):
        return ["hooked", original(*args, **kwargs)]

    return Hook(
        name=name,
        module="toy_engine",
        qualname=f"Engine.{method}",
        parameters=parameters,
        wrapper=wrapper,
    )


def test_a_hook_calls_the_original_of_any_kind(toy):
    for method, parameters in (
        ("plain", ("value",)),
        ("made", ("cls", "value")),
        ("run", ("self", "value")),
    ):
        hook = toy_hook(method, *parameters)
        hook.install()
        hook.install()
    engine = toy()
    assert toy.plain(3) == engine.plain(3) == ["hooked", 3]
    assert toy.made(3) == ["hooked", (toy, 3)]
    assert type("Sub", (toy,), {}).made(3)[1][0].__name__ == "Sub"
    assert engine.run(value=3) == ["hooked", (engine, 3)]


def test_two_hooks_on_one_function_both_stay(toy):
    first, second = toy_hook("run", "self", name="first"), toy_hook("run", "self", name="second")
    first.install()
    second.install()
    assert toy().run(3)[:1] == toy().run(3)[1][:1] == ["hooked"]


@pytest.mark.parametrize(
    "hook,found",
    [
        (toy_hook("run", "self", "other"), "('self', 'value')"),
        (toy_hook("run", "self", "value", "more"), "('self', 'value')"),
        (toy_hook("gone", "self"), "no such function"),
        (
            Hook(
                name="t",
                module="toy_engine",
                qualname="Lost.run",
                parameters=("self",),
                wrapper=print,
            ),
            "no such",
        ),
    ],
)
def test_a_target_that_differs_is_refused(toy, hook, found):
    before = dict(vars(toy))
    with pytest.raises(RuntimeError) as refused:
        hook.install()
    assert found in str(refused.value) and hook.qualname in str(refused.value)
    assert f"vLLM {vllm.__version__}" in str(refused.value) and "pip install 'vllm==0.32.*'" in str(
        refused.value
    )
    assert dict(vars(toy)) == before
