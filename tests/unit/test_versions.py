"""Comparing vLLM releases at the places routing touches, on small made-up ones."""

import importlib.metadata
import zipfile
from pathlib import Path

import pytest
import vllm

from versions.compare import compare, folder_of, main, places
from versions.overlay import overlay
from versions.source import source_of
from versions.wheel import RELEASES, newest_python_files, python_files
from vllm_reroute.vllm_seams.seams import TESTED_VERSIONS

OLD = {
    "vllm/__init__.py": "",
    "vllm/base.py": "class Base:\n    def inherited(self, a):\n        return a\n",
    "vllm/core/__init__.py": "from .deep import Core as Kernel\n",
    "vllm/core/deep.py": (
        "from vllm.base import Base\n\n\nclass Core(Base):\n    async def run(self, a):\n"
        "        return a\n\n\ndef plain():\n    return 1\n"
    ),
}
WHERE = [
    ("vllm.core", "Kernel.run"),
    ("vllm.core", "Kernel.inherited"),
    ("vllm.core.deep", "plain"),
]


def release(folder: Path, **changes: str) -> Path:
    for name, text in OLD.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        for before, after in changes.items():
            text = text.replace(before.replace("_", " "), after)
        file.write_text(text, encoding="utf-8")
    return folder


def test_changes_are_found_where_they_are(tmp_path):
    old, new = release(tmp_path / "old"), release(tmp_path / "new", return_1="return 2")
    assert [one.said for one in compare(old, new, WHERE)] == ["same", "same", "changed"]
    assert "-    return 1\n+    return 2" in compare(old, new, WHERE)[-1].diff
    lost = release(tmp_path / "lost", async_def_run="async def ran")
    assert [one.said for one in compare(old, lost, WHERE)] == ["gone", "same", "same"]
    with pytest.raises(ValueError, match=r"vllm.core.Kernel.run is not in"):
        compare(lost, old, WHERE)


def test_the_newest_release_is_whatever_pip_finds(tmp_path, monkeypatch, capsys):
    def download(requirement, folder):
        assert requirement == "vllm", "no version: pip takes the newest"
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "vllm-0.99.1-cp38-abi3-any.whl", "w") as wheel:
            for file in (tmp_path / "new").rglob("*.py"):
                wheel.write(file, file.relative_to(tmp_path / "new"))

    release(tmp_path / "new", return_1="return 2")
    monkeypatch.setattr("versions.wheel._download", download)
    found = newest_python_files(tmp_path / "store")
    assert found.name == "0.99.1"
    monkeypatch.setattr("versions.compare.newest_python_files", lambda: found)
    monkeypatch.setattr("versions.compare.places", lambda: WHERE)
    old = str(release(tmp_path / "old"))
    assert [main([old, "newest"]), main([old, "newest", "--exit-code"])] == [0, 1]
    assert main([old, old, "--exit-code"]) == 0
    assert "changed  vllm.core.deep.plain" in capsys.readouterr().out


def test_every_place_is_found_in_the_vllm_at_hand():
    """What the comparison starts from; a bad path would compare nothing."""
    site = Path(vllm.__file__).parents[1]
    assert [one for one in places() if source_of(site, *one) is None] == []
    assert folder_of(str(site)) == site


def test_every_tested_series_has_a_release():
    assert set(RELEASES) == set(TESTED_VERSIONS)
    with pytest.raises(ValueError, match=r"'0.1' is not known here. Known: 0.32, 0.33"):
        python_files("0.1")


def test_an_overlay_has_one_s_python_and_the_other_s_libraries(tmp_path, monkeypatch):
    monkeypatch.setattr("versions.wheel.NEW_REQUIREMENTS", {})
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "vllm-0.33.0-cp38-abi3-any.whl", "w") as wheel:
        wheel.writestr("vllm/__init__.py", "new = True")
        wheel.writestr("vllm/_C.abi3.so", "not for this machine")
        wheel.writestr("vllm-0.33.0.dist-info/METADATA", "Name: vllm")
    folder = overlay("0.33", tmp_path)
    assert (folder / "vllm" / "__init__.py").read_text() == "new = True"
    libraries = list(folder.rglob("*.so"))
    assert libraries and all(library.is_symlink() for library in libraries)
    (found,) = importlib.metadata.distributions(path=[str(folder)])
    local = importlib.metadata.version("vllm").partition("+")[2]
    assert found.version == (f"0.33.0+{local}" if local else "0.33.0")
    assert overlay("0.33", tmp_path) == folder, "again, without a wheel"
