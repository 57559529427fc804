"""The Python files of a vLLM release, from its wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

STORE = Path(__file__).resolve().parents[1] / ".local" / "versions"
RELEASES = {"0.32": "0.32.0", "0.33": "0.33.0"}
"""Version series -> the release that stands for it."""
NEW_REQUIREMENTS = {"0.33": ("orjson",)}
"""What a series imports that the installed vLLM did not bring."""


def python_files(series: str, store: Path = STORE) -> Path:
    """A folder with `vllm/` of that series, without compiled parts; downloaded by pip once.

    The wheel has several hundred MB; only its Python and data files are kept. Raises ValueError
    for a series nothing is known of.
    """
    if series not in RELEASES:
        raise ValueError(
            f"vLLM {series!r} is not known here. Known: {', '.join(RELEASES)}. Add it to RELEASES "
            f"in {Path(__file__).name}."
        )
    release = RELEASES[series]
    folder = store / release
    if not (folder / "vllm" / "__init__.py").exists():
        wheels = store / "wheels"
        if not list(wheels.glob(f"vllm-{release}-*.whl")):
            _download(f"vllm=={release}", wheels)
        (wheel,) = wheels.glob(f"vllm-{release}-*.whl")
        _unpack(wheel, folder)
        wheel.unlink()
    return folder


def newest_python_files(store: Path = STORE) -> Path:
    """The same of the newest release that pip finds, known here or not."""
    wheels = store / "wheels" / "newest"
    _download("vllm", wheels)
    (wheel,) = wheels.glob("vllm-*.whl")
    folder = store / wheel.name.split("-")[1]
    _unpack(wheel, folder)
    wheel.unlink()
    return folder


def _download(requirement: str, folder: Path) -> None:
    print(f"[versions] downloading {requirement} (several hundred MB, once)", file=sys.stderr)
    _pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement)


def add_requirements(series: str, folder: Path) -> None:
    """Install what the series needs besides into the folder itself, once."""
    for name in NEW_REQUIREMENTS.get(series, ()):
        if not (folder / name).exists():
            _pip("install", "--no-deps", "--target", str(folder), name)


def _pip(command: str, *words: str) -> None:
    quiet = ("--quiet", "--no-cache-dir", "--disable-pip-version-check")
    # What pip says is not for those who read the folder's name from standard output.
    subprocess.run(
        [sys.executable, "-m", "pip", command, *quiet, *words], check=True, stdout=sys.stderr
    )


def _unpack(wheel: Path, folder: Path) -> None:
    """All of `vllm/` but shared libraries."""
    with zipfile.ZipFile(wheel) as archive:
        names = [
            name
            for name in archive.namelist()
            if name.startswith("vllm/") and not name.endswith((".so", "/"))
        ]
        archive.extractall(folder, names)
