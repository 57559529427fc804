"""What the page holds, without a browser."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.explain.parts import clip, explanation, photo
from vllm_reroute.explain.explanation import Explanation
from vllm_reroute.explain.page import page_html


class Page(HTMLParser):
    """text: all that is shown without a script. rows: cells of the table. links: what is fetched."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.rows, self.links, self.ids = "", [], [], set()
        self._inside: list[str] = []
        self._scripts: list[str] = []
        self.feed(html)
        self.data = json.loads(self._scripts[0])

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        if tag not in ("meta", "input"):
            self._inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "script":
            self._scripts.append("")
        self.links += [v for k, v in attrs if k in ("src", "href", "action", "srcset")]
        self.ids |= {named["id"]} if "id" in named else set()

    def handle_endtag(self, tag):
        assert self._inside.pop() == tag, "tags are not nested"

    def handle_data(self, data):
        if self._inside and self._inside[-1] == "script":
            self._scripts[-1] += data
        elif "style" not in self._inside:
            self.text += data
            if "table" in self._inside and data.strip() and self.rows:
                self.rows[-1].append(data.strip())


def many(folders: dict[str, Path]) -> Explanation:
    """Two images of different size, and a video of an odd number of frames."""
    return explanation(folders["qwen2.5-vl"], [photo(0), photo(1, 250, 300), clip(5)])


def test_complete_in_itself(folders):
    html = page_html(many(folders))
    page = Page(html)
    assert page.links == []
    # Whatever the script makes, the browser may load nothing but what the page carries.
    assert "default-src 'none'; img-src data:;" in html
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # A name, not an address.


def test_shows_words_and_counts_without_a_script(folders):
    made = many(folders)
    page = Page(page_html(made))
    for words in ("What is shown here?", "A cat.", "A cat, close by.", "The answers differ."):
        assert words in page.text
    assert "--reroute-layers 3,4,6" in page.text and "qwen2.5-vl" in page.text
    header, *rows = page.rows
    assert header == ["Stage", "Layers", "Run", "Deferred", "Came back"]
    assert rows == [
        [str(i), layers, str(s.num_kept), str(s.num_deferred), str(s.num_brought_back)]
        for i, (s, layers) in enumerate(zip(made.stages, ("0-2", "3", "4-5", "6-7"), strict=True))
    ]
    assert made.stages[-1].num_brought_back > 0


def test_same_answers(folders):
    made = explanation(folders["llava"], [photo(0)], dense_answer="A cat.")
    assert "The answers are the same" in Page(page_html(made)).text


def test_removal_has_no_column_for_what_comes_back(folders):
    page = Page(page_html(explanation(folders["llava"], [photo(0)], action="remove")))
    assert page.rows[0] == ["Stage", "Layers", "Run", "Removed"]
    assert "came back" not in page.text


@pytest.mark.parametrize("family", ["llava", "llava-next", "llava-onevision", "qwen3-vl"])
def test_data_places_every_token_once(folders, family):
    made = explanation(folders[family], [photo(0), photo(1, 250, 300)])
    data = Page(page_html(made)).data
    tokens = [t for panel in data["panels"] for t in panel["tokens"] + panel["placeless"]]
    assert sorted(tokens) == list(range(made.trace.num_visual))
    boxes = np.concatenate([p.boxes[p.covers] for p in made.patches])
    shown = np.array([box for panel in data["panels"] for box in panel["boxes"]])
    assert np.allclose(shown[:, :2] + shown[:, 2:], boxes[:, 2:], atol=0.02)
    # LLaVA-NeXT and -OneVision look at each image twice, at the same embedded picture.
    looks = 2 if family in ("llava-next", "llava-onevision") else 1
    assert [panel["image"] for panel in data["panels"]] == [0] * looks + [1] * looks
    assert len(data["images"]) == 2
    for stage, told in zip(made.stages, data["stages"], strict=True):
        assert told["kept"] == np.flatnonzero(stage.kept).tolist()
        assert told["back"] == np.flatnonzero(stage.brought_back).tolist()
    assert data["stages"][0]["scores"] is None
    assert data["stages"][1]["scores"] == pytest.approx(made.trace.decisions[0].scores, rel=1e-3)
    assert data["stages"][1]["ranks"] == made.stages[1].ranks.tolist()


def test_removed_tokens_have_no_score(folders):
    data = Page(page_html(explanation(folders["llava"], [photo(0)], action="remove"))).data
    first, second = data["stages"][1:3]
    gone = sorted(set(range(144)) - set(first["kept"]))
    assert [t for t, score in enumerate(second["scores"]) if score is None] == gone


def test_pictures_are_those_given(folders):
    made = many(folders)
    data = Page(page_html(made)).data
    titles = [panel["title"] for panel in data["panels"]]
    assert titles == [
        "astronaut.jpg", "chelsea.jpg", "clip.mp4 · frames 1-2 of 5", "clip.mp4 · frames 3-4 of 5",
        "clip.mp4 · frame 5 of 5",
    ]  # fmt: skip
    for panel, drawn in zip(data["panels"], made.panels, strict=True):
        uri = data["images"][panel["image"]]
        shown = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
        assert shown.size == drawn.image.size
        off = np.asarray(shown.convert("RGB"), float) - np.asarray(drawn.image, float)
        assert np.abs(off).mean() < 4


def test_words_of_users_are_only_words(folders):
    given = '<script>alert("x")</script>'
    made = explanation(folders["llava"], [photo(0)], routed_answer=given, dense_answer=given)
    named = made.question.pictures[0].__class__(name=given, frames=made.question.pictures[0].frames)
    question = type(made.question)(
        model=made.question.model, text=given, pictures=(named,), max_tokens=8
    )
    page = Page(page_html(explanation(folders["llava"], [photo(0)], question=question)))
    assert given in page.text
    assert page.data["panels"][0]["title"] == given
    assert given in Page(page_html(made)).text


def test_script_finds_what_it_looks_for(folders):
    """Every element the script asks for by name is on the page."""
    html = page_html(many(folders))
    asked = set(re.findall(r'getElementById\("([\w-]+)"\)', html))
    (shown,) = re.findall(r"of \[([^]]+)\]\) document\.getElementById\(id\)", html)
    asked |= {name.strip(' "') for name in shown.split(",")}
    assert {"stage", "legend"} <= asked <= Page(html).ids


def test_sizes_must_agree(folders):
    made = explanation(folders["llava"], [photo(0)])
    other = explanation(folders["llava"], [photo(0), photo(1)])
    with pytest.raises(
        ValueError,
        match=r"gave these pictures 288 visual tokens, the model.s own processor 144.*--mm-processor-kwargs",
    ):
        Explanation(**{**vars_of(made), "trace": other.trace})


def vars_of(made: Explanation) -> dict:
    return {name: getattr(made, name) for name in made.__dataclass_fields__}
