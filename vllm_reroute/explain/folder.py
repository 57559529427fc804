"""The folder an explanation is left in."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_reroute.explain.drawing import sheet_image, stage_image
from vllm_reroute.explain.explanation import Explanation
from vllm_reroute.explain.page import page_html

PAGE, SHEET = "index.html", "sheet.png"
_OURS = re.compile(r"index\.html|sheet\.png|stage-\d+\.png")


def check_folder(folder: Path) -> None:
    """Raises ValueError where writing would mix with, or hide, files that are not ours."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file. Give a new folder.")
    if folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name))
        if others:
            raise ValueError(
                f"--out {folder} holds other files, such as {others[0]}. Give a new folder, or one "
                "that holds nothing but an earlier explanation: it is replaced."
            )


def write_folder(explanation: Explanation, folder: Path) -> list[Path]:
    """Leaves the page, the sheet and a picture per stage; returns their paths, the page first."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        # A longer schedule's stages would look like stages of this one.
        path.unlink()
    page, sheet = folder / PAGE, folder / SHEET
    page.write_text(page_html(explanation), encoding="utf-8")
    sheet_image(explanation).save(sheet)
    stages = [folder / f"stage-{index}.png" for index in range(len(explanation.stages))]
    for index, path in enumerate(stages):
        stage_image(explanation, index).save(path)
    return [page, sheet, *stages]
