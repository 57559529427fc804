"""An explanation as one HTML file: nothing is loaded from anywhere."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from vllm_reroute.explain.explanation import Explanation
from vllm_reroute.explain.wording import away, stage_counts, stage_title, summary

LONGEST_SIDE = 1024
"""Pixels of an embedded picture; its patches stay where they are."""
_JPEG_QUALITY = 88


def page_html(explanation: Explanation) -> str:
    """The page's whole text."""
    same = explanation.routed_answer == explanation.dense_answer
    words = {
        "title": f"Routing explained: {explanation.question.text}",
        "question": explanation.question.text,
        "facts": f"{summary(explanation)}.",
        "model": explanation.model_name,
        "routed": explanation.routed_answer,
        "dense": explanation.dense_answer,
        "verdict": "The answers are the same, word for word." if same else "The answers differ.",
        "away": away(explanation),
        "away_head": away(explanation).capitalize(),
        "last_stage": str(len(explanation.stages) - 1),
    }
    back = not explanation.removes
    parts = {
        "css": _source("page.css"),
        "js": _source("page.js"),
        "flags": " ".join(f"<code>{escape(flag)}</code>" for flag in explanation.flags),
        "rows": "\n".join(_rows(explanation)),
        "data": _json(_data(explanation)),
        "back_head": '<th scope="col">Came back</th>' * back,
        "back_key": '<span><i class="key back"></i>came back after having been deferred</span>'
        * back,
    }
    filled = {name: escape(text) for name, text in words.items()}
    return Template(_source("page.html")).substitute(filled | parts)


def _source(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8").rstrip("\n")


def _rows(explanation: Explanation) -> list[str]:
    rows = []
    for index, stage in enumerate(explanation.stages):
        first, end = stage.layers
        share = stage.num_kept / explanation.trace.num_visual
        cells = [
            f"<td>{first}-{end - 1}</td>" if end - first > 1 else f"<td>{first}</td>",
            f'<td>{stage.num_kept}<span class="bar"><i style="width:{share:.1%}"></i></span></td>',
            f"<td>{stage.num_deferred}</td>",
        ]
        if not explanation.removes:
            cells.append(f"<td>{stage.num_brought_back}</td>")
        button = (
            f'<button type="button" disabled aria-label="Show stage {index}">{index}</button>'
        )  # fmt: skip
        rows.append(f'<tr><th scope="row">{button}</th>{"".join(cells)}</tr>')
    return rows


def _data(explanation: Explanation) -> dict[str, Any]:
    """What the page's script draws from."""
    places = list(dict.fromkeys((panel.picture, panel.frame) for panel in explanation.panels))
    images = {(panel.picture, panel.frame): panel.image for panel in explanation.panels}
    return {
        "away": away(explanation),
        "images": [_data_uri(images[place]) for place in places],
        "panels": [
            {
                "title": panel.title,
                "image": places.index((panel.picture, panel.frame)),
                "width": panel.image.width,
                "height": panel.image.height,
                "tokens": panel.tokens.tolist(),
                # Left, top, width and height.
                "boxes": np.round(
                    np.concatenate(
                        (panel.boxes[:, :2], panel.boxes[:, 2:] - panel.boxes[:, :2]), axis=1
                    ),
                    2,
                ).tolist(),
                "placeless": panel.placeless.tolist(),
            }
            for panel in explanation.panels
        ],
        "stages": [
            {
                "title": stage_title(index, stage),
                "counts": stage_counts(explanation, stage),
                "kept": np.flatnonzero(stage.kept).tolist(),
                "back": np.flatnonzero(stage.brought_back).tolist(),
                "scores": None if stage.scores is None else [_number(s) for s in stage.scores],
                "ranks": None if stage.ranks is None else stage.ranks.tolist(),
            }
            for index, stage in enumerate(explanation.stages)
        ],
    }


def _number(score: np.float32) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(score) else float(f"{score:.4g}")


def _json(data: dict[str, Any]) -> str:
    """JSON that no `</script>` in a file's name can end."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _data_uri(image: Image.Image) -> str:
    if max(image.size) > LONGEST_SIDE:
        image = image.copy()
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    # Drawings stay sharp in PNG, photographs small in JPEG: whichever is smaller.
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": _JPEG_QUALITY})):
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        encoded.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, content = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
