"""What Nüwa needs of a model, what it refuses, and how the encoder's rows are split again."""

import pytest
import torch
from transformers import (
    LlavaConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    SiglipVisionConfig,
)
from vllm import ModelRegistry
from vllm.config import CompilationConfig

from benchmarks.local_model import TINY, make_config
from vllm_reroute.families.table import FAMILIES, family_of, nuwa_name
from vllm_reroute.models.architecture import RoutedArchitecture
from vllm_reroute.models.nuwa import Nuwa, with_anchor_column
from vllm_reroute.nuwa.requirements import check_model
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.plugin import register
from vllm_reroute.routing.prompt_rows import PromptRows, prompt_scores, text_mask
from vllm_reroute.routing.selection import select_rows
from vllm_reroute.schedule import CONFIG_KEY, RerouteOptions, RoutingSchedule
from vllm_reroute.schedule.budget import num_kept, num_kept_of_images

from .parts import feature, make_request
from .steps import Going, plan_of, routing_of
from .test_decision_cost import Operations

NUWA = {CONFIG_KEY: {"schedule": "nuwa"}}
CPU = torch.device("cpu")


def llava(**changes):
    config = make_config(TINY)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_families_with_nuwa():
    register()
    able = [family for family in FAMILIES if family.nuwa_class]
    assert [family.title for family in able] == ["LLaVA-1.5", "Qwen2.5-VL"]
    for family in able:
        name = nuwa_name(family.architecture)
        assert name in ModelRegistry.get_supported_archs()
        assert family_of(name) is family


def test_the_architecture_follows_the_schedule(engine_config):
    routed = engine_config(additional_config={CONFIG_KEY: {"schedule": "pdrop"}})
    nuwa = engine_config(additional_config=NUWA)
    assert routed.model_config.architecture == "RerouteLlavaForConditionalGeneration"
    assert nuwa.model_config.architecture == "RerouteNuwaLlavaForConditionalGeneration"
    assert RoutingSchedule.of(nuwa) == RerouteOptions(schedule="nuwa").resolve(8)


@pytest.mark.parametrize(
    "changes,shown",
    [
        ({"vision_config": SiglipVisionConfig()}, ["siglip_vision_model", "class token"]),
        ({"vision_config": PixtralVisionConfig()}, ["pixtral", "clip_vision_model"]),
        ({"vision_feature_layer": [-2, -5]}, ["vision_feature_layer [-2, -5]", "such as -2"]),
        ({"vision_feature_layer": 0}, ["vision_feature_layer 0"]),
        ({"vision_feature_select_strategy": "full"}, ["'full'", "'default'"]),
    ],
)
def test_towers_that_do_not_fit_are_refused(changes, shown):
    check_model(llava())
    with pytest.raises(ValueError) as refused:
        check_model(llava(**changes))
    for part in (*shown, "--reroute-schedule nuwa", "Allowed:", "Choose another"):
        assert part in str(refused.value)


def test_a_last_block_with_windows_is_refused():
    config = Qwen2_5_VLConfig(architectures=["Qwen2_5_VLForConditionalGeneration"])
    check_model(config)
    config.vision_config.fullatt_block_indexes = [7, 15]
    with pytest.raises(ValueError, match=r"fullatt_block_indexes \[7, 15\] of 32") as refused:
        check_model(config)
    assert "indexes with 31" in str(refused.value)


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.nuwa_class], ids=lambda f: f.title)
def test_other_families_are_refused(family):
    config = LlavaConfig(architectures=[family.architecture])
    with pytest.raises(ValueError) as refused:
        RoutedArchitecture(None, nuwa=True)(config)
    for part in (family.title, "Allowed with: LLaVA-1.5, Qwen2.5-VL", "Choose another"):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "arguments,shown",
    [
        ({"enable_mm_embeds": True}, "--enable-mm-embeds"),
        (
            {"compilation_config": CompilationConfig(compile_mm_encoder=True)},
            "compile_mm_encoder",
        ),
    ],
)
def test_options_that_hide_the_encoder_are_refused(engine_config, arguments, shown):
    with pytest.raises(ValueError) as refused:
        engine_config(additional_config=NUWA, **arguments)
    for part in (shown, "--reroute-schedule nuwa", "Allowed: unset", "Leave it out"):
        assert part in str(refused.value)


class Embedder:
    """Stands for vLLM's model class: text is embedded as its id, images are put in their places."""

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = input_ids.float().unsqueeze(1).repeat(1, 4)
        if multimodal_embeddings:
            embeds[is_multimodal] = torch.cat(list(multimodal_embeddings))
        return embeds


class Split(Nuwa, Embedder):
    def __init__(self):
        self._anchor_scores = None


def test_rows_are_split_again():
    model = Split()
    images = [torch.full((3, 4), 7.0), torch.full((2, 4), 8.0)]
    marks = [torch.tensor([True, False, True]), torch.tensor([False, True])]
    rows = [with_anchor_column(*image) for image in zip(images, marks, strict=True)]
    assert [tuple(row.shape) for row in rows] == [(3, 5), (2, 5)]
    places = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
    with Operations() as operations:
        embeds = model.embed_input_ids(torch.arange(9), rows, is_multimodal=places)
    assert operations.seen["aten.masked_scatter_.default"] == 1, "no index by a mask: that waits"
    assert embeds.tolist() == [[row] * 4 for row in (0, 7, 7, 7, 4, 5, 8, 8, 8)]
    assert model.encoder_scores(9).tolist() == [0, 1, 0, 1, 0, 0, 0, 1, 0]
    model.embed_input_ids(torch.arange(3), [], is_multimodal=torch.zeros(3, dtype=torch.bool))
    assert model.encoder_scores(3) is None, "nothing is left over for a step without images"


@pytest.mark.parametrize("seed", range(4))
def test_the_first_decision_is_exactly_the_anchors(seed):
    """Two requests, one with two images of different size, in a step with a decode."""
    generator = torch.Generator().manual_seed(seed)
    schedule = RerouteOptions(schedule="nuwa", tier=192).resolve(8)
    spans = [VisualSpans((1, 12), (9, 21)), VisualSpans((3,), (20,))]
    first, second = (
        Going(routing_of(span, prompt, schedule, block_size=32), 0, prompt)
        for span, prompt in zip(spans, (25, 30), strict=True)
    )
    step = plan_of([first, Going(None, 40, 1), second], schedule, block_size=32)
    expect, scores = set(), torch.zeros(56)
    for start, span in zip((0, 26), spans, strict=True):
        for first, size in zip(span.starts, span.sizes, strict=True):
            num_anchors = num_kept(size, schedule.encoder_ratio)
            cells = torch.randperm(size, generator=generator)[:num_anchors]
            expect |= {start + first + int(cell) for cell in cells}
    scores[sorted(expect)] = 1.0
    rows = PromptRows.of(step, None, CPU)
    text = text_mask(step, CPU)
    visual = ~text
    chosen = select_rows(
        prompt_scores(scores, rows),
        text,
        rows,
        [prefill.routing.kept[0] for prefill in step.prefills],
        step.stages[0].num_tokens,
    )
    assert {row for row in chosen.tolist() if visual[row]} == expect
    assert {row for row in chosen.tolist() if not visual[row]} == set(
        (~visual).nonzero().flatten().tolist()
    )


@pytest.mark.parametrize("sizes", [(20,), (20, 7), (3, 3, 3)])
def test_scheduler_and_worker_agree(sizes):
    """No stage is dense: not even the first one runs an image before the prompt's last token."""
    offset, images = 2, []
    for size in sizes:
        images.append(feature(offset, size))
        offset += size + 1
    request = make_request("r", offset + 5, images)
    spans = VisualSpans.of(request.mm_features)
    assert spans.sizes == sizes
    schedule = RerouteOptions(schedule="nuwa", tier=128).resolve(8)
    routing = RequestRouting.of(spans, request.prompt_token_ids, schedule, 2)
    prompt = request.num_prompt_tokens
    assert routing.dense_stages == 0 and routing.text_prefix == 2
    assert [routing.kv_length(stage, prompt - 1) for stage in range(2)] == [2, 2]
    for computed, scheduled in ((0, prompt), (0, 9), (9, prompt - 9), (prompt, 1)):
        going = Going(routing, computed, scheduled)
        step = plan_of([going], schedule, block_size=2)
        for stage, lengths in enumerate(step.stages):
            ratio = schedule.stages[stage].keep_ratio
            kept = num_kept_of_images(sizes, ratio, schedule.encoder_ratio)
            held = going.end - sum(sizes) + kept if going.end >= prompt else 2
            assert int(lengths.seq_lens[0]) == routing.kv_length(stage, going.end) == held
