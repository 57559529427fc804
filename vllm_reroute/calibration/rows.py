"""What was recorded, one file per sample, so that a run that was cut off goes on."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

IDENTITY = "identity.json"
NAMES = ("attention", "contribution", "change")


class RowFolder:
    """Recorded rows by their sample's digest.

    identity: everything rows depend on but the sample. Raises ValueError if the folder's rows
    were recorded with anything else.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        marker = path / IDENTITY
        if marker.exists():
            recorded = json.loads(marker.read_text(encoding="utf-8"))
            different = [
                f"{name} was {recorded.get(name)!r}, is {identity.get(name)!r}"
                for name in sorted({*recorded, *identity})
                if recorded.get(name) != identity.get(name)
            ]
            if different:
                raise ValueError(
                    f"{path} was recorded with something else: {'; '.join(different)}. Remove that "
                    "folder, or name another file with --out."
                )
            return
        path.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(dict(identity), indent=1) + "\n", encoding="utf-8")

    def load(self, digest: str) -> dict[str, np.ndarray] | None:
        """Arrays [layers, visual tokens] by their name; None if that sample was not recorded."""
        path = self._file(digest)
        if not path.exists():
            return None
        try:
            with np.load(path) as arrays:
                return {name: arrays[name] for name in NAMES}
        except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged ({error}). Remove it: it is recorded anew."
            ) from error

    def save(self, digest: str, **arrays: np.ndarray) -> None:
        """Whole or not at all."""
        path = self._file(digest)
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # takes them for its own options
        os.replace(unfinished, path)

    def _file(self, digest: str) -> Path:
        return self.path / f"{digest[:32]}.npz"
