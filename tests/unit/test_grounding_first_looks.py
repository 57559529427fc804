"""An unguided decoder finds what a question names before it has learned anything, and its layers start alike."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from benchmarks.grounding.first_looks import start_looking
from benchmarks.grounding.lessons import batch_of
from benchmarks.grounding.new_model import new_model
from benchmarks.grounding.packing import answer_pass
from benchmarks.grounding.recipe import RECIPES
from benchmarks.grounding.vocabulary import ATTRIBUTES, CELLS, attribute_tokens, word

WITNESS = RECIPES["witness"]


@pytest.fixture(scope="module")
def model():
    model = new_model(WITNESS.shape, seed=0)
    start_looking(model)
    return model


def ideal_tokens(model, shown: torch.Tensor) -> torch.Tensor:
    """[pictures, patches, width]: visual tokens that are the sum of the words for what they show."""
    words = model.get_output_embeddings().weight.detach()
    names = list(ATTRIBUTES)
    told = [
        words[torch.tensor(attribute_tokens()[name])][shown[..., names.index(name)]]
        for name in ("cell", "colour", "shape")
    ]
    return F.rms_norm(torch.stack(told).sum(dim=0), words.shape[-1:])


@torch.inference_mode()
def test_the_place_of_what_is_asked_for_is_found(model):
    lesson = dataclasses.replace(WITNESS.answering.lesson, kinds=("where",))
    batch = batch_of(range(3), lesson)
    found = answer_pass(model, ideal_tokens(model, batch.attributes), batch.lines).logits
    cells = torch.tensor([word(cell) for cell in CELLS])
    wanted = batch.lines.targets[batch.lines.targets >= 0]
    places = torch.isin(wanted, cells)
    likeliest = cells[found[places][:, cells].argmax(dim=-1)]
    assert (likeliest == wanted[places]).float().mean() > 0.6


def test_layers_start_alike(model):
    """Up to rotations inside their heads, so what they compute from the same stream is the same."""
    first, *others = (layer.self_attn for layer in dict.fromkeys(model.model.language_model.layers))
    copied = first.o_proj.weight @ first.v_proj.weight
    for other in others:
        same = other.o_proj.weight @ other.v_proj.weight
        torch.testing.assert_close(same, copied, rtol=1e-4, atol=1e-4)
