"""Packed questions get the logits they would get alone."""

from dataclasses import replace

import pytest
import torch

from benchmarks.grounding.lessons import batch_of, normalise
from benchmarks.grounding.new_model import new_model
from benchmarks.grounding.packing import answer_pass, pack, visual_tokens
from benchmarks.grounding.recipe import RECIPES
from benchmarks.grounding.vocabulary import IGNORED, encode, prompt_start


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


@torch.inference_mode()
def test_packing_equals_asking_alone(model, recipe):
    batch = batch_of(range(2), replace(recipe.answering.lesson, kinds=recipe.kinds[::2]))
    start = prompt_start(recipe.shape.patches**2)
    pixels = normalise(batch.pixels)
    packed = answer_pass(model, visual_tokens(model, pixels), batch.lines).logits
    lines = batch.lines
    alone = []
    for picture in range(2):
        for line in range(lines.ids.shape[1]):
            owners = lines.owner[picture, line]
            for question in owners[owners >= 0].unique_consecutive():
                mine = owners == question
                logits = model(
                    input_ids=torch.tensor([[*start, *lines.ids[picture, line][mine]]]),
                    pixel_values=pixels[picture][None],
                    use_cache=False,  # layers that repeat others share their number too
                ).logits[0, len(start) :]
                alone.append(logits[lines.targets[picture, line][mine] != IGNORED])
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_questions_that_do_not_fit_are_left_out():
    question, answer = encode("What is at b3?"), encode(" red circle")
    size = len(question) + len(answer) - 1
    fields = pack([(question, answer)] * 9, lines=2, length=2 * size + 1)
    assert fields["owner"].max() == 3
    assert (fields["owner"] >= 0).sum() == 4 * size
    assert (fields["targets"] != IGNORED).sum() == 4 * len(answer)
