"""Short model names."""

from __future__ import annotations

from pathlib import Path

from vllm_reroute.families.table import FAMILIES

SHORT_NAMES: dict[str, str] = {
    short: full for family in FAMILIES for short, full in family.short_names.items()
}
"""Short name -> Hugging Face id."""


def resolve_model(name: str) -> str:
    """The Hugging Face id of a short name; a local folder of that name wins; others pass through."""
    if Path(name).is_dir():
        return name
    return SHORT_NAMES.get(name, name)
