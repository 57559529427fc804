"""Asking over HTTP: what is an answer, and what is not."""

import pytest
from PIL import Image

from benchmarks.grounding.questions import Question, questions
from benchmarks.quality.asking import Endpoint, ask_all, prompt_of, prompts_of
from tests.unit.quality_stub import Reply, stub

REPLIES = {
    "good": Reply(content="Yes."),
    "cut at the limit": Reply(content="yes yes", finish_reason="length"),
    "empty": Reply(content=""),
    "server error": Reply(status=500),
    "refused": Reply(status=400),
    "aborted": Reply(content="ye", finish_reason="abort"),
    "error inside": Reply(content="", finish_reason="error"),
    "no text": Reply(content=None),
    "a web page": Reply(body="<html>busy</html>"),
    "too late": Reply(wait_s=3),
}
ANSWERED = ("good", "cut at the limit", "empty")


def question(text: str) -> Question:
    image = Image.new("RGB", (28, 28), "red")
    return Question(image=image, text=text, answer="yes", kind="at", scene_seed=0)


def asked(url: str, texts, concurrency: int = 4) -> dict:
    outcomes = []
    endpoint = Endpoint(url=url, model="stub", timeout_s=1.5)
    ask_all(endpoint, prompts_of(map(question, texts)), concurrency, outcomes.append)
    return {texts[each.index]: each for each in outcomes}


def test_whatever_is_no_finished_answer_is_a_failure():
    texts = list(REPLIES)
    with stub(REPLIES.get) as server:
        outcomes = asked(server.url, texts)
    assert list(outcomes.keys() - set(ANSWERED)) and len(outcomes) == len(texts)
    for text, outcome in outcomes.items():
        assert outcome.failed is (text not in ANSWERED), text
        assert (outcome.error is None) is (text in ANSWERED), text
    assert outcomes["good"].answer == "Yes."
    assert "finish_reason 'abort'" in outcomes["aborted"].error
    assert "Timeout" in outcomes["too late"].error
    # Nothing was sent twice behind our back.
    assert sorted(server.asked) == sorted(texts)


def test_a_server_that_is_gone_fails_every_question():
    with stub(lambda _: Reply()) as server:
        url = server.url
    outcomes = asked(url, ["a", "b"])
    assert all(outcome.failed for outcome in outcomes.values()) and len(outcomes) == 2


def test_requests_run_at_once_but_no_more_than_told():
    texts = [f"number {i}" for i in range(12)]
    with stub(lambda text: Reply(content=text)) as server:
        outcomes = asked(server.url, texts, concurrency=4)
    assert 2 <= server.at_once <= 4
    assert {text: outcome.answer for text, outcome in outcomes.items()} == {t: t for t in texts}


def test_a_digest_follows_picture_text_and_answer():
    one = question("Where?")
    other_picture = Image.new("RGB", (28, 28), (255, 0, 1))
    changed = [
        question("What?"),
        Question(image=one.image, text=one.text, answer="no", kind="at", scene_seed=0),
        Question(image=other_picture, text=one.text, answer="yes", kind="at", scene_seed=0),
    ]
    digests = {prompt_of(0, each).digest for each in (one, *changed)}
    assert len(digests) == 4
    assert prompt_of(5, question("Where?")).digest == prompt_of(0, one).digest


def test_fewer_questions_are_the_first_of_more():
    """What lets a quick trial be continued by a full run."""
    few, more = prompts_of(questions("test", 11)), prompts_of(questions("test", 14))
    assert few == more[:11]


def test_an_unanswered_question_raises_for_no_visual_count():
    import openai

    from benchmarks.quality.asking import visual_tokens_in

    with stub(lambda _: Reply(status=500)) as server, pytest.raises(openai.InternalServerError):
        visual_tokens_in(
            Endpoint(url=server.url, model="stub"), prompt_of(0, question("?")), image_token=4
        )
