"""What a resumed training run must not forget, and how rates and guidance run."""

import pytest
import torch

from benchmarks.grounding.new_model import new_model
from benchmarks.grounding.train import (
    COOLDOWN,
    RATES,
    STEPS,
    guidance_weight,
    optimizers,
    rate,
    set_rates,
)


@pytest.fixture(scope="module")
def model():
    return new_model(seed=0)


def rates_of(stepping) -> list[float]:
    return [group["lr"] for each in stepping for group in each.param_groups]


@pytest.mark.parametrize("phase", STEPS)
def test_rates_fall_after_a_resume_too(model, phase):
    """Loading an optimizer's state puts other groups in place of those it was made with."""
    first = optimizers(model, phase)
    set_rates(first, phase, STEPS[phase] // 2)
    resumed = optimizers(model, phase)
    for each, other in zip(resumed, first, strict=True):
        each.load_state_dict(other.state_dict())
    peaks = [peak for peak in RATES[phase] if peak]
    for step in (STEPS[phase] // 2, STEPS[phase] - 1):
        set_rates(resumed, phase, step)
        factor = rate(step, STEPS[phase], COOLDOWN[phase])
        assert rates_of(resumed) == pytest.approx([peak * factor for peak in peaks])
    assert max(rates_of(resumed)) < 0.01 * max(peaks)


@pytest.mark.parametrize("phase", STEPS)
def test_every_parameter_is_stepped_once_and_the_decoder_only_while_answering(model, phase):
    stepped = [
        id(parameter)
        for each in optimizers(model, phase)
        for group in each.param_groups
        for parameter in group["params"]
    ]
    assert len(stepped) == len(set(stepped))
    decoder = {id(parameter) for parameter in model.model.language_model.layers.parameters()}
    assert decoder <= set(stepped) if phase == "answering" else not decoder & set(stepped)


def test_guidance_is_gone_before_training_ends():
    weights = [guidance_weight(step, 100) for step in range(100)]
    assert weights[0] == 1 and weights[-1] == 0
    assert torch.tensor(weights).diff().max() <= 0
