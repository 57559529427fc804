"""The page in a real browser: keyboard, pointer, phone width, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.explain.browser import CHROMIUM, Browser
from tests.explain.parts import clip, explanation, photo
from vllm_reroute.explain.page import page_html
from vllm_reroute.explain.pictures import image_of
from vllm_reroute.explain.question import Question

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (Debian: apt install chromium)"
)
FOCUSED = "document.activeElement.tagName + '#' + document.activeElement.id"
TITLE, COUNTS, TOKEN = (
    f"document.getElementById('{name}').textContent"
    for name in ("stage-title", "stage-counts", "token")
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def made(folders):
    return explanation(folders["llava-onevision"], [photo(0), photo(1, 250, 300), clip(3)])


@pytest.fixture(scope="module")
def page(made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(page_html(made), encoding="utf-8")
    return path


def test_nothing_fails_and_nothing_is_fetched(browser, page):
    browser.open(page, 1280, 900)
    assert browser.value("document.querySelectorAll('svg image').length") == 2 * 2 + 3
    assert browser.errors == []
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}


def test_slider_by_keyboard(browser, made, page):
    browser.open(page, 1280, 900)
    browser.press("Tab")
    assert browser.value(FOCUSED) == "INPUT#stage"
    for index, stage in enumerate(made.stages):
        assert browser.value(TITLE).startswith(f"Stage {index} ")
        assert browser.value(
            "document.getElementById('stage').ariaValueText || "
            "document.getElementById('stage').getAttribute('aria-valuetext')"
        )
        for name, num in (
            ("rect.patch.away", sum((~stage.kept)[p.tokens].sum() for p in made.panels)),
            ("tr[aria-current] + tr", int(index + 1 < len(made.stages))),
        ):
            assert browser.value(f"document.querySelectorAll('{name}').length") == num
        marks = "[...document.querySelectorAll('path.back.frame')].map(p => p.getAttribute('d'))"
        assert browser.value(f"{marks}.join('').split('M').length - 1") == sum(
            stage.brought_back[p.tokens].sum() for p in made.panels
        )
        browser.press("ArrowRight")
    browser.press("ArrowLeft")
    assert browser.value(TITLE).startswith(f"Stage {len(made.stages) - 2} ")


def test_focus_is_visible_and_patches_are_reached_by_keyboard(browser, made, page):
    browser.open(page, 1280, 900)
    browser.press("Tab")
    browser.press("ArrowRight")
    browser.press("Tab")
    assert browser.value(FOCUSED) == "svg#"
    outline = "getComputedStyle(document.activeElement)"
    assert browser.value(f"{outline}.outlineStyle") == "solid"
    assert browser.value(f"parseFloat({outline}.outlineWidth)") >= 2
    assert "overview" in browser.value("document.activeElement.getAttribute('aria-label')")
    # The overview has three columns: right is one token on, down is three.
    side = 3
    told = []
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp"):
        browser.press(key)
        told.append(int(browser.value(TOKEN).split(":")[0].removeprefix("Token ")))
    assert told == [1, 1 + side, side, 0, 0]
    decision, stage = made.trace.decisions[0], made.stages[1]
    assert f"score {decision.scores[0]:.3g}"[:9] in browser.value(TOKEN)
    assert f"rank {stage.ranks[0]} of {made.trace.num_visual}" in browser.value(TOKEN)
    browser.press("PageDown")
    assert browser.value(TITLE).startswith("Stage 2 ")


def test_score_of_the_patch_under_the_pointer(browser, made, page):
    browser.open(page, 1280, 900)
    browser.value("document.querySelectorAll('tbody button')[2].click()")
    decision, stage = made.trace.decisions[1], made.stages[2]
    for token in (4, int(made.panels[1].tokens[3]), int(made.panels[-1].tokens[0])):
        place = browser.value(
            "(() => { const r = [...document.querySelectorAll('rect.patch')]"
            f".find(r => r.token === {token}); r.scrollIntoView({{block: 'center'}});"
            "const b = r.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
        )
        browser.point_at(*place)
        said = browser.value(TOKEN)
        assert said.startswith(f"Token {token}: ")
        assert f"rank {stage.ranks[token]} of" in said
        score = float(said.split("score ")[1].split(",")[0])
        assert score == pytest.approx(decision.scores[token], rel=5e-3)
        fate = (
            "came back"
            if stage.brought_back[token]
            else "runs"
            if stage.kept[token]
            else "deferred"
        )
        assert f"Token {token}: {fate} " in said


def test_long_words_stay_inside_a_phone(browser, folders, tmp_path):
    """A question, an answer and a file name without a blank to break at."""
    word = "verylong" * 20
    picture = image_of(word, photo(0).frames[0])
    question = Question(model=word, text=word, pictures=(picture,), max_tokens=8)
    made = explanation(folders["llava"], [picture], question=question, routed_answer=word)
    path = tmp_path / "index.html"
    path.write_text(page_html(made), encoding="utf-8")
    browser.open(path, 360, 800)
    assert browser.value("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_width_and_colours(browser, page, tmp_path, width, dark):
    browser.open(page, width, 800, dark=dark)
    browser.value("document.querySelectorAll('tbody button')[2].click()")
    assert browser.value("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('svg, table, .controls, figcaption, h1, code')]"
    assert browser.value(f"Math.max(...{wide}.map(e => e.getBoundingClientRect().right))") <= width
    small = "[...document.querySelectorAll('tbody button, #stage')]"
    assert browser.value(f"Math.min(...{small}.map(e => e.getBoundingClientRect().height))") >= 24
    shot = tmp_path / "page.png"
    browser.screenshot(shot)
    pixels = np.asarray(Image.open(shot).convert("L"), dtype=float)
    paper = pixels[-5:, :5].mean()
    assert paper < 60 if dark else paper > 200
    assert pixels.std() > 20  # Something is drawn on it.


def test_contrast(browser, page):
    """Every word against its own background: WCAG's 4.5 to 1."""
    script = """(() => {
      const light = (c) => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(Number).map(x => x / 255)
        .map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
        return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
      const paper = (e) => { while (e) { const c = getComputedStyle(e).backgroundColor;
        if (c !== 'rgba(0, 0, 0, 0)') return c; e = e.parentElement; } };
      return Math.min(...[...document.querySelectorAll('h1,h2,p,code,th,td,button,caption,figcaption,label,b,span')]
        .filter(e => e.textContent.trim() && e.offsetParent).map(e => {
        const pair = [light(getComputedStyle(e).color), light(paper(e))].sort((a, b) => b - a);
        return (pair[0] + .05) / (pair[1] + .05); })); })()"""
    for dark in (False, True):
        browser.open(page, 1280, 900, dark=dark)
        browser.press("Tab")
        browser.press("Tab")
        assert browser.value(script) >= 4.5
