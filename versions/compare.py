"""What changed between two vLLM releases wherever routing touches vLLM: `python -m versions.compare 0.32 0.33`."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from versions.source import source_of
from versions.wheel import RELEASES, newest_python_files, python_files


@dataclass(frozen=True)
class Change:
    """One seam or hook. diff: empty where nothing changed. gone: not found in the new release."""

    name: str
    diff: str
    gone: bool = False

    @property
    def said(self) -> str:
        return "gone" if self.gone else "changed" if self.diff else "same"


def places() -> list[tuple[str, str]]:
    """Module and qualified name of every seam and hook of the package."""
    from vllm_reroute.admission.engine_core import ENGINE_CORE
    from vllm_reroute.admission.front_end import FRONT_END
    from vllm_reroute.runners.v1_hook import MODEL_RUNNER_V1
    from vllm_reroute.startup.engine_args import ENGINE_ARGS
    from vllm_reroute.vllm_seams.seams import SEAMS

    hooks = (*ENGINE_ARGS, *FRONT_END, ENGINE_CORE, MODEL_RUNNER_V1)
    return [(place.module, place.qualname) for place in (*SEAMS, *hooks)]


def compare(old: Path, new: Path, where: Iterable[tuple[str, str]]) -> list[Change]:
    """old, new: folders with a `vllm/` each. Raises ValueError for what `old` does not have."""
    changes = []
    for module, qualname in where:
        name = f"{module}.{qualname}"
        before = source_of(old, module, qualname)
        after = source_of(new, module, qualname)
        if before is None:
            raise ValueError(f"{name} is not in {old}: compare from a version it was written for.")
        lines = difflib.unified_diff(
            before.splitlines(), (after or "").splitlines(), "old", "new", lineterm=""
        )
        changes.append(Change(name, "\n".join(lines), gone=after is None))
    return changes


def folder_of(version: str) -> Path:
    """A known series' wheel, the newest release's, or a folder that holds `vllm/` (an installed
    site-packages, a checkout)."""
    if Path(version, "vllm").is_dir():
        return Path(version)
    if version == "newest":
        return newest_python_files()
    return python_files(version)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m versions.compare", description=__doc__)
    known = ", ".join(RELEASES)
    parser.add_argument("old", help=f"one of {known}, newest, or a folder that holds vllm/")
    parser.add_argument("new", help="the same")
    parser.add_argument("--exit-code", action="store_true", help="end with 1 if anything differs")
    args = parser.parse_args(argv)
    try:
        changes = compare(folder_of(args.old), folder_of(args.new), places())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for change in changes:
        print(f"{change.said:8} {change.name}")
    for change in changes:
        if change.diff:
            print(f"\n=== {change.name}\n{change.diff}")
    return int(args.exit_code and any(change.said != "same" for change in changes))


if __name__ == "__main__":
    sys.exit(main())
