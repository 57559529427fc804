"""Tiers of tests: a test's folder says which one it belongs to, so no test says it itself."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TIERS = {
    "unit": "unit",
    "oracle": "engine",
    "explain": "engine",
    "engine": "engine",
    "server": "server",
}
"""Folder -> marker. What runs whole models counts as the engine tier, also without an engine."""


def tier_of(path: Path) -> str:
    """Marker of a file under tests/. Raises ValueError for a folder that has no tier."""
    folder = path.relative_to(TESTS).parts[0]
    if folder not in TIERS:
        raise ValueError(f"tests/{folder} has no tier. Give it one in {__file__}.")
    return TIERS[folder]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Other tiers' folders are not even imported where one tier alone is asked for."""
    wanted = config.option.markexpr
    if wanted not in TIERS.values() or collection_path.parent != TESTS:
        return None
    folder = collection_path.is_dir() and collection_path.name in TIERS
    return True if folder and tier_of(collection_path) != wanted else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(tier_of(item.path))
        if item.path.name.startswith("test_gpu_"):
            item.add_marker("gpu")
