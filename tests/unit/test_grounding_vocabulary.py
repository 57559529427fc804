"""The tokenizer: one token per word of the task, any text comes back, prompts as LLaVA-1.5 writes them."""

import pytest

from benchmarks.grounding.conversations import conversations
from benchmarks.grounding.evaluate import prompt
from benchmarks.grounding.evaluate_talks import messages
from benchmarks.grounding.lessons import exchanges
from benchmarks.grounding.questions import questions
from benchmarks.grounding.scenes import render
from benchmarks.grounding.vocabulary import (
    VISUAL_TOKENS,
    WORDS,
    answer_tokens,
    encode,
    make_processor,
    prompt_start,
    question_tokens,
    trained_tokenizer,
)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def test_words_are_one_token():
    assert [word for word in WORDS if len(encode(f" {word}")) != 1] == []


@pytest.mark.parametrize("text", ["Ünï 漢字 foo-bar  baz\n!", "Why b33?  ", "<b>§ 12,5 €</b>"])
def test_any_text_comes_back(text):
    tokenizer = trained_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_training_sees_the_tokens_that_serving_sees(processor):
    for question in questions("train", 18):
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        chat = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        assert chat == "<s>" + prompt(question.text)
        said = processor(
            text=f"{chat} {question.answer}", images=question.image, add_special_tokens=False
        )
        assert list(said["input_ids"][0]) == [
            *prompt_start(),
            *question_tokens(question.text),
            *answer_tokens(question.answer)[:-1],
        ]


def test_conversations_are_trained_as_they_are_served(processor):
    """Answers in the history have no end of text; a picture may come with any turn."""
    pictures = set()
    for talk in conversations("train", 24):
        said = [turn.asked.answer for turn in talk.turns]
        chat = processor.apply_chat_template(messages(talk, said[:-1]), add_generation_prompt=True)
        served = processor(
            text=chat, images=[render(scene) for scene in talk.scenes], add_special_tokens=False
        )
        asked = exchanges(talk.turns, VISUAL_TOKENS)
        trained = [word for question, answer in asked for word in (*question, *answer[:-1])]
        last = len(asked[-1][1]) - 1
        assert list(served["input_ids"][0]) == [*prompt_start(), *trained[:-last]]
        pictures.add(len(talk.scenes))
    assert pictures == {1, 2}
