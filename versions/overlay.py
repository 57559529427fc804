"""Another vLLM's Python over the installed one's compiled parts: `python -m versions.overlay 0.33`.

Prints the folder to put on PYTHONPATH. A preview, for releases that have no CPU build yet: where
their Python calls a kernel the installed build lacks, it fails when it does.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from pathlib import Path

from versions.wheel import RELEASES, STORE, add_requirements, python_files


def overlay(series: str, store: Path = STORE) -> Path:
    """The folder: `vllm/` of that series, links to the installed shared libraries, metadata."""
    folder = python_files(series, store)
    add_requirements(series, folder)
    installed = _installed()
    for library in installed.rglob("*.so"):
        place = folder / "vllm" / library.relative_to(installed)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.is_symlink():
            place.symlink_to(library)
    # vLLM takes its platform from the version of the distribution named vllm.
    local = importlib.metadata.version("vllm").partition("+")[2]
    version = f"{RELEASES[series]}+{local}" if local else RELEASES[series]
    metadata = folder / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8"
    )
    return folder


def _installed() -> Path:
    """The installed vLLM, not an overlay that is on the path."""
    for folder in map(Path, sys.path):
        if folder.name == "site-packages" and (folder / "vllm" / "__init__.py").exists():
            return folder / "vllm"
    raise RuntimeError("vLLM is not installed in this environment. Run `make setup` first.")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m versions.overlay", description=__doc__)
    parser.add_argument("series", choices=RELEASES)
    print(overlay(parser.parse_args().series))
    return 0


if __name__ == "__main__":
    sys.exit(main())
