"""Finished measurements as JSON files, one per wave, kept and reused by later runs."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from benchmarks.quality.provenance import REPOSITORY

# A change in any of these may change a time. What parts measure is in their results; how they are
# summarised may change without measuring again.
SOURCES = (
    "vllm_reroute",
    "benchmarks/bench/client.py",
    "benchmarks/bench/conversations.py",
    "benchmarks/bench/device.py",
    "benchmarks/bench/driving.py",
    "benchmarks/bench/engines.py",
    "benchmarks/bench/routed_generate.py",
    "benchmarks/bench/worker.py",
    "benchmarks/local_model.py",
    "benchmarks/seeded_weights.py",
)


@dataclass(frozen=True)
class Store:
    """A folder of finished waves.

    identity: everything a wave's numbers depend on, but the wave itself, in JSON's types.
    """

    folder: Path
    identity: Mapping

    def wave(self, name: str) -> dict | None:
        """The finished wave, or None. Raises ValueError if it was measured with something else."""
        path = self._path(name)
        if not path.exists():
            return None
        entry = read(path)
        recorded, wanted = entry["identity"], dict(self.identity)
        different = sorted(
            key for key in recorded.keys() | wanted.keys() if recorded.get(key) != wanted.get(key)
        )
        if different:
            told = "; ".join(
                f"{k} was {recorded.get(k)!r}, is {wanted.get(k)!r}" for k in different
            )
            raise ValueError(
                f"{path} was measured with something else: {told}. Measure it anew with --fresh, or "
                "name another folder with --out."
            )
        return entry["measured"]

    def measured(self, name: str, run: Mapping, measure: Callable[[], dict]) -> dict:
        """The wave, measured unless it is finished already. run: provenance of a measurement now."""
        known = self.wave(name)
        if known is not None:
            return known
        found = measure()
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = {"identity": dict(self.identity), "run": dict(run), "measured": found}
        # Renamed when complete: a run that is killed leaves no half of it.
        path = self._path(name)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
        return json.loads(json.dumps(found))

    def forget(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def read(path: Path) -> dict:
    """A wave's file: `identity`, `run` and `measured`."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}). Measure it anew with --fresh.") from error
    if not isinstance(entry, dict) or not {"identity", "run", "measured"} <= entry.keys():
        raise ValueError(f"{path} holds no measurement. Remove it, or measure anew with --fresh.")
    return entry


def sources_digest(root: Path = REPOSITORY) -> str:
    """Of the code whose speed is measured, and of the code that measures it."""
    digest = sha256()
    for source in SOURCES:
        path = root / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
