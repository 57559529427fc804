"""Folders that are complete or absent, and know what they were made from."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

MARKER = "shape.json"


def build_folder(path: Path | str, wanted: dict, save: Callable[[Path], None]) -> Path:
    """Lets `save` fill a folder aside and renames it to `path`, unless `path` was made from `wanted` already.

    wanted: everything the files depend on, as JSON has it.
    """
    path = Path(path)
    if _marker(path) == wanted:
        return path
    if path.exists() and _marker(path) is None:
        raise ValueError(
            f"{path} exists and was not made by this program. Name another folder, or remove it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        save(building)
        (building / MARKER).write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        building.chmod(0o755)
        _replace(path, building, wanted)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return path


def _marker(path: Path) -> dict | None:
    try:
        return json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _replace(path: Path, building: Path, wanted: dict) -> None:
    """Renames `building` to `path`, dropping an older one. Of several builders at once, the first wins."""
    if _marker(path) == wanted:
        return
    shutil.rmtree(path, ignore_errors=True)
    try:
        os.rename(building, path)
    except OSError:
        if _marker(path) != wanted:
            raise
