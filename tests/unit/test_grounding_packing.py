"""Packed questions and conversations get the logits they would get alone."""

from dataclasses import replace

import pytest
import torch

from benchmarks.grounding.lessons import batch_of, normalise
from benchmarks.grounding.new_model import new_model
from benchmarks.grounding.packing import answer_pass, pack, visual_tokens
from benchmarks.grounding.recipe import RECIPES
from benchmarks.grounding.vocabulary import IGNORED, IMAGE_TOKEN, encode, prompt_start, token


@pytest.fixture(params=RECIPES.values(), ids=RECIPES)
def recipe(request):
    return request.param


@pytest.fixture
def model(recipe):
    """Untrained, but with every block doing something."""
    model = new_model(recipe.shape, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("two_pictures", [False, True])
@torch.inference_mode()
def test_packing_equals_asking_alone(model, recipe, two_pictures):
    lesson = replace(recipe.answering.lesson, kinds=recipe.kinds[::2])
    if two_pictures and not lesson.talks:
        pytest.skip("single questions have one picture")
    batch = batch_of(range(2), lesson, two_pictures)
    start = prompt_start(recipe.shape.patches**2)
    pixels = normalise(batch.pixels)
    packed = answer_pass(model, visual_tokens(model, pixels), batch.lines).logits
    lines = batch.lines
    alone, pictures_seen = [], []
    for picture in range(1 if lesson.talks else 2):
        for line in range(lines.ids.shape[1]):
            owners = lines.owner[picture, line]
            for talk in owners[owners >= 0].unique_consecutive():
                mine = owners == talk
                ids = torch.tensor([[*start, *lines.ids[picture, line][mine]]])
                seen = int((ids == token(IMAGE_TOKEN)).sum()) // recipe.shape.patches**2
                pictures_seen.append(seen)
                logits = model(
                    input_ids=ids,
                    pixel_values=pixels[[picture, 1 - picture][:seen]],
                    use_cache=False,  # layers that repeat others share their number too
                ).logits[0, len(start) :]
                alone.append(logits[lines.targets[picture, line][mine] != IGNORED])
    expected = torch.cat(alone)
    torch.testing.assert_close(packed[: len(expected)], expected, rtol=1e-4, atol=1e-4)
    assert max(pictures_seen) == 1 + two_pictures
    questions = lines.question.flatten(1).amax(1) + 1
    assert (questions > lines.owner.flatten(1).amax(1) + 1).any() == lesson.talks


def test_questions_that_do_not_fit_are_left_out():
    question, answer = encode("What is at b3?"), encode(" red circle")
    size = len(question) + len(answer) - 1
    fields = pack([[(question, answer)]] * 9, lines=2, length=2 * size + 1)
    assert fields["owner"].max() == 3
    assert (fields["owner"] >= 0).sum() == 4 * size
    assert (fields["targets"] != IGNORED).sum() == 4 * len(answer)


def test_an_answers_end_is_said_but_not_read():
    """In a conversation the next question follows the answer's last word."""
    first, second = (encode("What is at b3?"), (7, 8, 2)), (encode(" Where is it?"), (9, 2))
    fields = pack([[first, second]], lines=1, length=30)
    mine = fields["owner"][0] == 0
    assert fields["ids"][0][mine].tolist() == [*first[0], 7, 8, *second[0], 9]
    told = fields["targets"][0][mine]
    assert told[told != IGNORED].tolist() == [7, 8, 2, 9, 2]
    assert fields["question"][0][mine].unique_consecutive().tolist() == [0, 1]
    assert fields["offset"][0][mine].tolist() == list(range(int(mine.sum())))
