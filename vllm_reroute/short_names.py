"""Short model names."""

from __future__ import annotations

from pathlib import Path

SHORT_NAMES: dict[str, str] = {
    "llava-1.5": "llava-hf/llava-1.5-7b-hf",
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
}
"""Short name -> Hugging Face id."""


def resolve_model(name: str) -> str:
    """The Hugging Face id of a short name; a local folder of that name wins; others pass through."""
    if Path(name).is_dir():
        return name
    return SHORT_NAMES.get(name, name)
