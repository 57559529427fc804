"""The documentation site: README, docs/ and a reference from docstrings (`make docs`).

Pages keep their places relative to each other, so links are the same here and in the repository.
"""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / ".local" / "site-source"
SITE = ROOT / ".local" / "site"
PACKAGE = "vllm_reroute"

FIRST = (
    "guide", "chats", "recall", "operations", "how-it-works", "methods", "results", "extending", "compatibility",
)  # fmt: skip
"""The order of docs/; further pages follow by name."""
PROJECT = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "patches/README.md")
FOLDERS = ("docs", "benchmarks", "examples", "patches")
SHOWN = (".md", ".svg", ".png", ".csv", ".json", ".toml")


def main() -> int:
    """Returns 1 where a link leads nowhere, or a docstring refers to what is not there."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    shutil.rmtree(SOURCE, ignore_errors=True)
    pages = [Path("README.md"), *(Path(name) for name in PROJECT if "/" not in name)]
    for folder in FOLDERS:
        found = (ROOT / folder).rglob("*")
        pages += [path.relative_to(ROOT) for path in found if path.suffix in SHOWN]
    for page in pages:
        (SOURCE / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / page, SOURCE / page)
    names = sorted(page.stem for page in pages if page.match("docs/*.md"))
    names = [*FIRST, *(name for name in names if name not in FIRST)]
    figures = [
        {str(page.relative_to("benchmarks").with_suffix("")): str(page)}
        for page in sorted(pages)
        if page.parts[0] == "benchmarks" and page.suffix == ".md"
    ]
    nav = [
        {"vllm_reroute": "README.md"},
        {"Documents": [f"docs/{name}.md" for name in names]},
        {"Figures": figures},
        {"Project": list(PROJECT)},
        {"Reference": [{room: _reference(room)} for room in _rooms()]},
    ]
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), nav=nav))
    except Abort as stopped:
        print(stopped, file=sys.stderr)
        return 1
    print(f"The site is in {SITE.relative_to(ROOT)}: open index.html, or serve the folder.")
    return 0


def _rooms() -> list[str]:
    folders = [path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")]
    return sorted(folders)


def _reference(room: str) -> str:
    """Writes the page of a folder: its modules, one after the other. Returns its place."""
    place = Path("reference", f"{room}.md")
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / PACKAGE / room).rglob("*.py"))
    ]
    (SOURCE / place).parent.mkdir(exist_ok=True)
    blocks = "\n\n".join(f"::: {module}" for module in modules)
    (SOURCE / place).write_text(f"# {room}\n\n{blocks}\n", encoding="utf-8")
    return str(place)


if __name__ == "__main__":
    sys.exit(main())
