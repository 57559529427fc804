"""Pictures of every stage, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vllm_reroute.explain.explanation import DrawnPanel, Explanation
from vllm_reroute.explain.wording import away, stage_counts, stage_title, summary

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, FAINT, PAPER = "#1a202c", "#5a6475", "#ffffff"
BACK = "#f08c00"
RUNS, RUNS_EDGE = (0, 0, 0, 0), (255, 255, 255, 60)
VEIL, VEIL_EDGE = (14, 18, 28, 195), (60, 68, 84, 205)
STRIKE = (150, 160, 180, 225)
UNSEEN = (120, 126, 138, 215)
MARGIN, GAP, BESIDE = 28, 18, 8
STAGE_WIDTH, SHEET_WIDTH = 1200, 1780
STAGE_CELL, SHEET_CELL = 560, 270
MOST_LARGE = 6
"""With more looks than this at a time (frames of videos), each is drawn smaller."""


def stage_image(explanation: Explanation, index: int) -> Image.Image:
    """One stage: every look with what ran, waited and came back, and the answers."""
    width = STAGE_WIDTH - 2 * MARGIN
    panels = explanation.panels
    cell = STAGE_CELL if len(panels) <= MOST_LARGE else SHEET_CELL
    drawn = [panel_image(explanation, panel, index, cell) for panel in panels]
    if len(panels) == 1:
        drawn.insert(0, _as_given(panels[0], cell))
    stage = explanation.stages[index]
    return _framed(
        [
            _text(stage_title(index, stage), width, 30, bold=True),
            _text(stage_counts(explanation, stage), width, 22),
            _flow(drawn, width),
            _legend(explanation, width),
            *_words(explanation, width),
        ],
        STAGE_WIDTH,
    )


def sheet_image(explanation: Explanation) -> Image.Image:
    """All stages one after the other, and the answers."""
    width = SHEET_WIDTH - 2 * MARGIN
    first_looks = {(panel.picture, panel.frame): panel for panel in reversed(explanation.panels)}
    given = [_as_given(first_looks[place], SHEET_CELL) for place in sorted(first_looks)]
    blocks = [_block("As given", "", given, width)]
    for index, stage in enumerate(explanation.stages):
        drawn = [panel_image(explanation, p, index, SHEET_CELL) for p in explanation.panels]
        blocks.append(
            _block(stage_title(index, stage), stage_counts(explanation, stage), drawn, width)
        )
    return _framed(
        [
            _text("What each stage of the decoder saw", width, 30, bold=True),
            _text(
                f"{summary(explanation)}\n{explanation.model_name}  {' '.join(explanation.flags)}",
                width,
                18,
                FAINT,
            ),
            _flow(blocks, width),
            _legend(explanation, width),
            *_words(explanation, width),
        ],
        SHEET_WIDTH,
    )


def _block(title: str, counts: str, drawn: Sequence[Image.Image], width: int) -> Image.Image:
    """Looks under a title, no wider than they need."""
    block_width = min(width, sum(picture.width + GAP for picture in drawn) - GAP)
    words = [_text(title, block_width, 20, bold=True), _text(counts, block_width, 16, lines=2)]
    return _stacked([*words, _flow(drawn, block_width)], gap=6)


def _as_given(panel: DrawnPanel, cell: int) -> Image.Image:
    """The picture alone."""
    return _titled(_scaled(panel.image, cell), panel.image_title)


def _scaled(image: Image.Image, cell: int) -> Image.Image:
    """As large as a square cell allows."""
    scale = cell / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _titled(shown: Image.Image, title: str) -> Image.Image:
    return _stacked([shown, _text(title, shown.width, 15, FAINT)], gap=4)


def panel_image(explanation: Explanation, panel: DrawnPanel, index: int, cell: int) -> Image.Image:
    """One look in one stage, with its title, at most `cell` wide and high."""
    stage = explanation.stages[index]
    image = _scaled(panel.image, cell).convert("RGBA")
    over = Image.new("RGBA", image.size, UNSEEN)
    draw = ImageDraw.Draw(over)
    boxes = np.rint(panel.boxes * (cell / max(panel.image.size))).astype(int)
    for token, (left, top, right, bottom) in zip(panel.tokens, boxes, strict=True):
        fill, edge = (RUNS, RUNS_EDGE) if stage.kept[token] else (VEIL, VEIL_EDGE)
        draw.rectangle((left, top, right - 1, bottom - 1), fill=fill, outline=edge)
        if not stage.kept[token]:
            _strike(draw, (left, top, right, bottom))
    for token, box in zip(panel.tokens, boxes, strict=True):
        if stage.brought_back[token]:
            _mark_back(draw, box)
    return _titled(Image.alpha_composite(image, over).convert("RGB"), panel.title)


def _strike(draw: ImageDraw.ImageDraw, box: Sequence[int]) -> None:
    """Tells what waits from what runs where the picture itself is dark."""
    left, top, right, bottom = (int(edge) for edge in box)
    draw.line((left, bottom - 1, right - 1, top), fill=STRIKE)


def _mark_back(draw: ImageDraw.ImageDraw, box: Sequence[int]) -> None:
    """A frame and a filled corner: told from the others without colour too."""
    left, top, right, bottom = (int(edge) for edge in box)
    side = min(right - left, bottom - top)
    draw.rectangle(
        (left, top, right - 1, bottom - 1), outline=BACK, width=min(max(2, side // 12), 5)
    )
    corner = min(max(4, side // 3), 28)
    draw.polygon([(left, top), (left + corner, top), (left, top + corner)], fill=BACK)


def _legend(explanation: Explanation, width: int) -> Image.Image:
    entries = ["runs in this stage", away(explanation)]
    if not explanation.removes:
        entries.append("came back after having been deferred")
    entries.append("no visual token covers this")
    drawn = []
    for number, words in enumerate(entries):
        key = Image.new("RGBA", (28, 28), "#7fa8d8")
        over = Image.new("RGBA", key.size, (0, 0, 0, 0))
        draw = ImageDraw.Draw(over)
        if words == away(explanation):
            draw.rectangle((0, 0, 27, 27), fill=VEIL)
            _strike(draw, (0, 0, 28, 28))
        elif number == len(entries) - 1:
            draw.rectangle((0, 0, 27, 27), fill=UNSEEN)
        elif number == 2:
            _mark_back(draw, (0, 0, 28, 28))
        key = Image.alpha_composite(key, over).convert("RGB")
        label = _text(words, round(_font(18).getlength(words)) + 4, 18)
        drawn.append(_beside(key, label))
    return _flow(drawn, width)


def _words(explanation: Explanation, width: int) -> list[Image.Image]:
    asked = {
        "Question": explanation.question.text,
        "Routed": explanation.routed_answer,
        "Dense": explanation.dense_answer,
    }
    column = 120
    return [
        _beside(
            _text(label, column, 20, FAINT),
            _text(words, width - column - BESIDE, 20, bold=label == "Routed"),
        )
        for label, words in asked.items()
    ]


def _framed(parts: Sequence[Image.Image], width: int) -> Image.Image:
    inner = _stacked(parts, gap=GAP)
    page = Image.new("RGB", (width, inner.height + 2 * MARGIN), PAPER)
    page.paste(inner, (MARGIN, MARGIN))
    return page


def _stacked(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    height = sum(part.height + gap for part in parts) - gap
    whole = Image.new("RGB", (max(part.width for part in parts), height), PAPER)
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height + gap
    return whole


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    size = (left.width + BESIDE + right.width, max(left.height, right.height))
    whole = Image.new("RGB", size, PAPER)
    whole.paste(left, (0, 0))
    whole.paste(right, (left.width + BESIDE, 0))
    return whole


def _flow(parts: Sequence[Image.Image], width: int) -> Image.Image:
    """Side by side in rows, as words are."""
    rows: list[list[Image.Image]] = [[]]
    used = 0
    for part in parts:
        if rows[-1] and used + part.width > width:
            rows.append([])
            used = 0
        rows[-1].append(part)
        used += part.width + GAP
    lines = []
    for row in rows:
        line = Image.new("RGB", (width, max(part.height for part in row)), PAPER)
        left = 0
        for part in row:
            line.paste(part, (left, 0))
            left += part.width + GAP
        lines.append(line)
    return _stacked(lines, gap=GAP)


def _text(
    words: str, width: int, size: int, color: str = INK, bold: bool = False, lines: int = 1
) -> Image.Image:
    """Words in as many lines as they need, and room for `lines` of them at least."""
    font = _font(size)
    wrapped = [line for paragraph in words.split("\n") for line in _wrapped(paragraph, width, font)]
    image = Image.new("RGB", (width, round(size * 1.35) * max(lines, len(wrapped))), PAPER)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(wrapped):
        place = (0, number * round(size * 1.35))
        draw.text(place, line, fill=color, font=font, stroke_width=0.4 if bold else 0)
    return image


def _wrapped(words: str, width: int, font: Font) -> list[str]:
    lines = [""]
    for word in words.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _font(size: int) -> Font:
    """DejaVu where the system has it, for its many scripts; else Pillow's own."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)
