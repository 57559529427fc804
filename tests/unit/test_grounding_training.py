"""What a resumed training run must not forget, and how rates and guidance run."""

import pytest
import torch

from benchmarks.grounding.evaluate import load
from benchmarks.grounding.lessons import Lessons
from benchmarks.grounding.new_model import new_model
from benchmarks.grounding.recipe import RECIPES
from benchmarks.grounding.train import Trainer, guidance_weight, optimizers, rate, set_rates
from benchmarks.grounding.vocabulary import IMAGE_TOKEN, token

PHASES = [
    pytest.param(recipe, name, id=f"{made}-{name}")
    for made, recipe in RECIPES.items()
    for name in recipe.phases
]


@pytest.fixture(scope="module")
def models():
    return {id(recipe): new_model(recipe.shape, seed=0) for recipe in RECIPES.values()}


def rates_of(stepping) -> list[float]:
    return [group["lr"] for each in stepping for group in each.param_groups]


@pytest.mark.parametrize(("recipe", "name"), PHASES)
def test_rates_fall_after_a_resume_too(models, recipe, name):
    """Loading an optimizer's state puts other groups in place of those it was made with."""
    model, phase = models[id(recipe)], recipe.phases[name]
    first = optimizers(model, phase)
    set_rates(first, phase, phase.steps // 2)
    resumed = optimizers(model, phase)
    for each, other in zip(resumed, first, strict=True):
        each.load_state_dict(other.state_dict())
    peaks = [peak for peak in phase.rates if peak]
    for step in (phase.steps // 2, phase.steps - 1):
        set_rates(resumed, phase, step)
        factor = rate(step, phase)
        assert rates_of(resumed) == pytest.approx([peak * factor for peak in peaks])
    assert max(rates_of(resumed)) < 0.01 * max(peaks)


@pytest.mark.parametrize(("recipe", "name"), PHASES)
def test_every_parameter_is_stepped_once_and_the_decoder_only_while_answering(models, recipe, name):
    model = models[id(recipe)]
    stepped = [
        id(parameter)
        for each in optimizers(model, recipe.phases[name])
        for group in each.param_groups
        for parameter in group["params"]
    ]
    assert len(stepped) == len(set(stepped))
    decoder = {id(parameter) for parameter in model.model.language_model.layers.parameters()}
    assert decoder <= set(stepped) if name == "answering" else not decoder & set(stepped)


def test_guidance_is_gone_before_training_ends():
    weights = [guidance_weight(step, 100) for step in range(100)]
    assert weights[0] == 1 and weights[-1] == 0
    assert torch.tensor(weights).diff().max() <= 0


def test_the_witness_is_not_told_where_to_look():
    """No guide, and no layer that starts unlike the others of its depth: they repeat in turn."""
    recipe = RECIPES["witness"]
    assert Lessons(recipe.answering.lesson, first_seed=0)[0].guide is None
    assert recipe.shape.looks_on_from == 0
    layers = new_model(recipe.shape, seed=0).model.language_model.layers
    assert len(layers) == recipe.shape.text_layers
    assert {id(layer) for layer in layers} == {id(layer) for layer in layers[:4]}
    assert all(layers[n] is layers[n % 4] for n in range(len(layers)))


def test_the_conversing_model_goes_on_from_the_guided_one(tmp_path):
    recipe = RECIPES["conversing"]
    assert list(recipe.phases) == ["answering"] and recipe.learnt_from == RECIPES["guided"].folder
    trainer = Trainer(recipe, tmp_path / "state.pt", worker=0, workers=1, resume=False)
    learnt = load(recipe.learnt_from, torch.float32)[0].state_dict()
    assert all(torch.equal(learnt[n], weight) for n, weight in trainer.model.state_dict().items())


def test_every_third_lesson_in_conversing_has_second_pictures():
    lessons = Lessons(RECIPES["conversing"].answering.lesson, first_seed=0)
    image = [(lessons[step].lines.ids == token(IMAGE_TOKEN)).any().item() for step in range(6)]
    assert image == [False, False, True] * 2
