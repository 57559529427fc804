"""The cost model against numbers worked out by hand, against the footprint, and as `plan` prints it."""

import re
from dataclasses import replace

import pytest
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    SiglipVisionConfig,
)

from vllm_reroute.command_line import main
from vllm_reroute.schedule import RerouteOptions
from vllm_reroute.schedule.cost_model import DecoderShape, RequestCost, vision_shape
from vllm_reroute.schedule.footprint import RequestFootprint

# Two layers of everything by hand: 4 wide, 2 heads of 3, 1 of them for K/V, 5 inside, 7 words.
TOY = DecoderShape(
    num_layers=4,
    hidden_size=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=3,
    intermediate_size=5,
    vocab_size=7,
)
LLAVA_7B = LlavaConfig(
    architectures=["LlavaForConditionalGeneration"],
    vision_config=CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    ),
    text_config=LlamaConfig(vocab_size=32064),
)
VISUAL, TEXT = 576, 104


def cost_of(options: dict, decoder: DecoderShape = TOY, images: int = 1, **changes) -> RequestCost:
    cost = RequestCost(
        decoder=decoder,
        vision=None,
        schedule=RerouteOptions.from_mapping(options).resolve(decoder.num_layers),
        image_sizes=(VISUAL,) * images,
        num_text=TEXT,
    )
    return replace(cost, **changes)


def test_one_layer_by_hand():
    # Q and O are 4 x 6, K and V 4 x 3, and three matrices of 4 x 5.
    assert TOY.layer_parameters == 2 * 24 + 2 * 12 + 3 * 20 == 132
    assert TOY.step_parameters == 4 * 132 + 4 * 7
    # Three tokens attend to 1 + 2 + 3 keys; each pair is 6 values in QK and 6 in PV.
    assert TOY.layer_flops(3) == 2 * 3 * 132 + 2 * 2 * 6 * (1 + 2 + 3)
    # K of 3 tokens, Q, K and V of one, and one row of 3 products of 6 values.
    assert TOY.decision_flops(3) == 2 * 3 * 12 + 2 * (24 + 12 + 12) + 2 * 3 * 6


def test_llava_7b_dense_by_hand():
    decoder = DecoderShape.of(LLAVA_7B.get_text_config())
    assert decoder.layer_parameters == 4 * 4096**2 + 3 * 4096 * 11008
    cost = cost_of({"schedule": "fastv"}, decoder)
    linear, attention = 2 * 680 * 32 * 202_375_168, 2 * 4096 * 680 * 681 * 32
    assert cost.dense_flops == linear + attention + 2 * 4096 * 32064
    # 344 MiB without rounding to blocks: 680 tokens x 32 layers x 4096 x K and V x 2 bytes.
    assert 2 * cost.kv_values(routed=False) == 680 * 32 * 4096 * 2 * 2


def test_clip_tower_by_hand():
    tower = vision_shape(LLAVA_7B, VISUAL)
    # The layer before the last is read: 23 run, on 576 patches and the class token.
    linear = 2 * 577 * 23 * (4 * 1024**2 + 2 * 1024 * 4096)
    attention = 23 * 4 * 1024 * 577**2
    assert tower.flops == linear + attention + 2 * 576 * (1024 * 4096 + 4096**2)


def test_qwen_tower_has_windows():
    config = Qwen2_5_VLConfig()
    tower, vision = vision_shape(config, VISUAL), config.vision_config
    assert tower.num_patches == 4 * VISUAL
    assert tower.span == 64 and tower.global_layers == len(vision.fullatt_block_indexes) == 4
    everywhere = replace(tower, span=tower.num_patches)
    local = vision.depth - 4
    assert everywhere.flops - tower.flops == (
        4 * vision.hidden_size * local * tower.num_patches * (tower.num_patches - 64)
    )


def test_an_unknown_tower_is_not_counted():
    config = LlavaConfig(vision_config=SiglipVisionConfig(), text_config=LlamaConfig())
    assert vision_shape(config, VISUAL) is None


def test_head_size_of_its_own():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    shape = DecoderShape.of(config)
    assert (shape.query_size, shape.key_size) == (128, 64)


def test_keeping_everything_saves_and_costs_nothing():
    cost = cost_of({"layers": [1, 2], "keep": [1.0, 1.0]})
    assert cost.routed_flops == cost.dense_flops and cost.token_ratio == 1
    assert cost.kv_values(routed=True) == cost.kv_values(routed=False)


def test_stages_by_hand():
    cost = cost_of({"layers": [1, 3], "keep": [0.5, 0.25]})
    assert [(c.stage.num_layers, c.num_tokens) for c in cost.stages] == [
        (1, 680),
        (2, 392),
        (1, 248),
    ]
    assert [c.flops for c in cost.stages] == [
        n * TOY.layer_flops(k) for n, k in ((1, 680), (2, 392), (1, 248))
    ]
    # Rerouted tokens are all candidates at every decision, removed ones only once.
    assert [c.decision_flops for c in cost.stages] == [0, *[TOY.decision_flops(680)] * 2]
    removed = cost_of({"layers": [1, 3], "keep": [0.5, 0.25]})
    removed = replace(removed, schedule=replace(removed.schedule, action="remove"))
    assert [c.decision_flops for c in removed.stages] == [
        0,
        TOY.decision_flops(680),
        TOY.decision_flops(392),
    ]


def test_the_encoders_decision_costs_the_decoder_nothing():
    decoder = replace(TOY, num_layers=32)
    removed = cost_of({"schedule": "nuwa", "action": "remove", "tier": 64}, decoder)
    assert [c.decision_flops for c in removed.stages] == [0, decoder.decision_flops(112 + TEXT)]
    back = cost_of({"schedule": "nuwa", "variant": "B", "tier": 64}, decoder)
    assert back.stages[1].decision_flops == decoder.decision_flops(VISUAL + TEXT)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("options", [{"schedule": "fastv"}, {"schedule": "nuwa"}])
def test_it_agrees_with_the_footprint(options, images):
    decoder = replace(TOY, num_layers=32)
    cost = cost_of(options, decoder, images)
    footprint = RequestFootprint(
        schedule=cost.schedule,
        num_visual=images * VISUAL,
        num_text=TEXT,
        bytes_per_token=2 * decoder.key_size * 2,
        block_size=1,
        image_sizes=cost.image_sizes,
    )
    assert 2 * cost.kv_values(routed=True) == footprint.ideal_bytes == footprint.routed_bytes
    assert 2 * cost.kv_values(routed=False) == footprint.dense_bytes
    assert cost.token_ratio == pytest.approx(footprint.ideal_bytes / footprint.dense_bytes)
    if images == 1:
        average = cost.schedule.average(VISUAL)
        assert cost.token_ratio == pytest.approx((TEXT + average) / (TEXT + VISUAL))


def test_weights_are_read_once_a_step():
    cost = cost_of({"schedule": "pdrop"}, replace(TOY, num_layers=32))
    one, two = (cost.step_values(n, routed=True) for n in (1, 2))
    assert two - one == cost.kv_values(routed=True)
    assert one - cost.kv_values(routed=True) == cost.decoder.step_parameters


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava-7b")
    LLAVA_7B.save_pretrained(folder)
    return str(folder)


def plan(capsys, model, *words) -> str:
    code = main(["plan", "--model", model, "--reroute-schedule", "pdrop", *words])
    shown = capsys.readouterr()
    assert (code, shown.err) == (0, "")
    return shown.out


def test_plan_predicts_ratios_and_no_times(capsys, model):
    shown = plan(capsys, model)
    assert "PREDICTION by arithmetic, not a measurement" in shown and "Assumed: 1 image" in shown
    assert not re.search(r"\d ms", shown)
    cost = cost_of({"schedule": "pdrop"}, DecoderShape.of(LLAVA_7B.get_text_config()))
    cost = replace(cost, vision=vision_shape(LLAVA_7B, VISUAL))
    assert f"{cost.dense_flops / cost.routed_flops:.2f} times less" in shown
    assert f"{1 / cost.token_ratio:.2f} times fewer" in shown


def test_plan_bounds_times_on_named_hardware(capsys, model):
    words = ["--peak-tflops", "100", "--bandwidth", "1000", "--pool-gib", "8"]
    one, two = plan(capsys, model, *words), plan(capsys, model, *words, "--devices", "2")
    cost = cost_of({"schedule": "pdrop"}, DecoderShape.of(LLAVA_7B.get_text_config()))
    cost = replace(cost, vision=vision_shape(LLAVA_7B, VISUAL))
    # 10^14 per second: a tenth of a millisecond per 10^10.
    assert (
        f"dense {cost.dense_flops / 1e11:.2f} ms, routed {cost.routed_flops / 1e11:.2f} ms" in one
    )
    assert f"dense {cost.dense_flops / 2e11:.2f} ms" in two
    step = 2 * cost.step_values(1, routed=False) / 1e9
    assert f"{step:.2f} / " in one and f"{step / 2:.2f} / " in two
    # 8 GiB hold 23 requests of 344 MiB; each of two devices holds half of every request.
    assert "8 GiB per device: 23 dense" in one and "8 GiB per device: 47 dense" in two


def test_plan_of_several_images(capsys, model):
    assert "1152 visual + 104 text" in plan(capsys, model, "--images", "2")


@pytest.mark.parametrize("flag", ["--peak-tflops", "--bandwidth", "--pool-gib"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x"])
def test_hardware_that_makes_no_sense_is_refused(capsys, model, flag, value):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--model", model, "--reroute-schedule", "pdrop", flag, value])
    assert stopped.value.code == 2 and flag in capsys.readouterr().err
