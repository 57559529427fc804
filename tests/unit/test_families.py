"""The table of model families, and what a family may ask of a schedule."""

import importlib

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, PixtralVisionConfig, Qwen3VLConfig
from vllm import ModelRegistry
from vllm.sequence import IntermediateTensors

from vllm_reroute.families.deepstack import first_decision_layer
from vllm_reroute.families.table import FAMILIES, family_of, routed_name
from vllm_reroute.families.visual_tokens import fixed_visual_tokens, visual_tokens_per_image
from vllm_reroute.models.architecture import RoutedArchitecture
from vllm_reroute.models.rerouted import Rerouted
from vllm_reroute.plugin import register
from vllm_reroute.routing.stage import build_stage
from vllm_reroute.schedule import RerouteOptions, Stage
from vllm_reroute.schedule.published import ACTIONS, TIERS

# Decision layers published for Qwen2.5-VL-7B, see the Reroute paper's code.
QWEN_LAYERS = {
    ("fastv", "remove"): (3,),
    ("pdrop", "remove"): (2, 6, 13, 20),
    ("fastv", "reroute"): (3, 6, 13, 20),
    ("pdrop", "reroute"): (2, 6, 13, 20),
}
# True averages of 576 at tiers 192, 128, 64: the ratios are LLaVA's, so the tiers are missed.
QWEN_AVERAGES = {
    ("fastv", "remove"): (197.4, 134.0, 71.5),
    ("pdrop", "remove"): (192.2, 129.4, 83.5),
    ("pdrop", "reroute"): (193.4, 130.7, 88.3),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
def test_a_family_is_vllms_class_with_the_mixin(family):
    module, _, name = family.model_class.partition(":")
    routed = getattr(importlib.import_module(module), name)
    assert issubclass(routed, Rerouted)
    stock = [base.__name__ for base in routed.__mro__[1:]]
    assert family.architecture in stock
    # Nothing of vLLM's class comes before the mixin, which must see every call first.
    assert routed.__mro__[1] is Rerouted


def test_register_makes_every_family_known():
    register()
    register()
    known = ModelRegistry.get_supported_archs()
    assert {routed_name(family.architecture) for family in FAMILIES} <= set(known)


def test_names_lead_to_one_family():
    shorts = [short for family in FAMILIES for short in family.short_names]
    assert len(set(shorts)) == len(shorts)
    for family in FAMILIES:
        assert family_of(family.architecture) is family
        assert family_of(routed_name(family.architecture)) is family
    assert family_of("InternVLChatModel") is None


@pytest.mark.parametrize("method,layers", QWEN_LAYERS.items(), ids=str)
def test_published_qwen_schedules(method, layers):
    name, action = method
    schedules = [RerouteOptions(schedule=name, action=action, tier=t).resolve(28) for t in TIERS]
    assert {schedule.layers for schedule in schedules} == {layers}
    if method in QWEN_AVERAGES:
        found = [round(schedule.average(576), 1) for schedule in schedules]
        assert tuple(found) == QWEN_AVERAGES[method]


def deepstack(levels):
    return Qwen3VLConfig(vision_config={"deepstack_visual_indexes": list(range(levels))})


@pytest.mark.parametrize("levels,first", [(0, 1), (1, 1), (3, 3)])
def test_first_decision_layer_waits_for_deepstack(levels, first):
    assert first_decision_layer(deepstack(levels)) == first


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", ["fastv", "pdrop"])
def test_named_schedules_start_after_deepstack(name, action):
    plain = RerouteOptions(schedule=name, action=action).resolve(36)
    moved = RerouteOptions(schedule=name, action=action).resolve(36, 3)
    assert moved.layers == (3, *plain.layers[1:])
    assert moved.keep == plain.keep
    squeezed = RerouteOptions(schedule=name, action=action).resolve(36, 20)
    assert squeezed.layers[0] == 20
    assert list(squeezed.layers) == sorted(set(squeezed.layers))


def test_own_layers_below_deepstack_are_refused():
    options = RerouteOptions(layers=(2, 8), keep=(0.5, 0.25))
    with pytest.raises(ValueError) as refused:
        options.resolve(28, 3)
    for part in ("--reroute-layers 2,8", "layers 0 to 2", "Start at 3 or later"):
        assert part in str(refused.value)
    assert RerouteOptions(layers=(3, 8), keep=(0.5, 0.25)).resolve(28, 3).layers == (3, 8)


def test_features_are_added_after_the_first_layers(engine_config):
    """One set after each, in order, and none after the others."""
    layers = [lambda positions, hidden, residual: (hidden * 2, residual)] * 4
    config = engine_config(enforce_eager=True)
    stage = build_stage(layers, Stage(first_layer=0, end_layer=4, keep_ratio=1.0), config)
    sets = {name: torch.full((1, 1), value) for name, value in (("first", 10.0), ("then", 300.0))}
    hidden, _ = stage(torch.zeros(1), torch.ones(1, 1), None, IntermediateTensors(sets))
    assert hidden.item() == ((1 * 2 + 10) * 2 + 300) * 2 * 2


def llava(**changes):
    vision = changes.pop("vision", CLIPVisionConfig(image_size=336, patch_size=14))
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"], vision_config=vision, **changes
    )


@pytest.mark.parametrize(
    "config,fixed",
    [
        (llava(), 576),
        (llava(vision_feature_select_strategy="full"), 577),
        (llava(vision=PixtralVisionConfig(image_size=1024, patch_size=16)), None),
        (Qwen3VLConfig(architectures=["Qwen3VLForConditionalGeneration"]), None),
    ],
    ids=["clip", "clip-with-class-token", "pixtral", "qwen3-vl"],
)
def test_only_a_fixed_grid_has_fixed_visual_tokens(config, fixed):
    assert fixed_visual_tokens(config) == fixed
    assert visual_tokens_per_image(config) == (fixed or 576)
    # The same for the config of a routed engine.
    assert fixed_visual_tokens(RoutedArchitecture(None)(config)) == fixed


def test_an_unknown_architecture_is_refused():
    config = llava()
    config.architectures = ["InternVLChatModel"]
    with pytest.raises(ValueError) as refused:
        RoutedArchitecture(None)(config)
    for family in FAMILIES:
        assert family.architecture in str(refused.value)
