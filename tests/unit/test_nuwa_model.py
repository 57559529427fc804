"""What Nüwa needs of a model, what it refuses, and how the encoder's rows are split again."""

import numpy as np
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
from vllm_reroute.kv_cache.spec import RoutedAttentionSpec
from vllm_reroute.models.nuwa import Nuwa, with_anchor_column
from vllm_reroute.nuwa.requirements import check_model
from vllm_reroute.plan.routed_length import routed_length
from vllm_reroute.plan.step_plan import RequestRouting, plan_step
from vllm_reroute.plan.visual_spans import VisualSpans, visual_spans
from vllm_reroute.plugin import register
from vllm_reroute.routing.prompt_rows import PromptRows, prompt_scores, visual_mask
from vllm_reroute.routing.scorers.attention import last_prompt_row, last_prompt_rows
from vllm_reroute.routing.selection import select_rows
from vllm_reroute.schedule import CONFIG_KEY, RerouteOptions, RoutingSchedule
from vllm_reroute.startup.architecture import RoutedArchitecture

from .parts import feature, make_request

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
    embeds = model.embed_input_ids(torch.arange(9), rows, is_multimodal=places)
    assert embeds[:, 0].tolist() == [0, 7, 7, 7, 4, 5, 8, 8, 8]
    assert model.encoder_scores(9).tolist() == [0, 1, 0, 1, 0, 0, 0, 1, 0]
    model.embed_input_ids(torch.arange(3), [], is_multimodal=torch.zeros(3, dtype=torch.bool))
    assert model.encoder_scores(3) is None, "nothing is left over for a step without images"


@pytest.mark.parametrize("seed", range(4))
def test_the_first_decision_is_exactly_the_anchors(seed):
    """Two requests, one with two images of different size, in a step with a decode."""
    generator = torch.Generator().manual_seed(seed)
    ratio = 0.5
    spans = [VisualSpans((1, 12), (9, 21)), VisualSpans((3,), (20,))]
    prompts = [25, 30]
    routings = [
        RequestRouting.of(span, range(prompt), (ratio, 0.1), ratio)
        for span, prompt in zip(spans, prompts, strict=True)
    ]
    step = plan_step(
        np.array([0, 40, 0]), np.array([25, 1, 30]), [routings[0], None, routings[1]], (ratio, 0.1)
    )
    expect, scores = set(), torch.zeros(56)
    for start, span in zip((0, 26), spans, strict=True):
        for first, size in zip(span.starts, span.sizes, strict=True):
            cells = torch.randperm(size, generator=generator)[: size // 2]
            expect |= {start + first + int(cell) for cell in cells}
    scores[sorted(expect)] = 1.0
    rows = PromptRows.of(step, None, CPU)
    visual = visual_mask(step, CPU)
    chosen = select_rows(
        prompt_scores(scores, rows),
        visual,
        rows,
        [prefill.routing.num_kept(0) for prefill in step.prefills],
        step.lengths[ratio].num_tokens,
    )
    assert {row for row in chosen.tolist() if visual[row]} == expect
    assert {row for row in chosen.tolist() if not visual[row]} == set(
        (~visual).nonzero().flatten().tolist()
    )


@pytest.mark.parametrize("num_queries", [1, 2, 3])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_rows_of_the_last_tokens(num_queries, heads):
    """Rows of causal attention: averaged over tokens first, then combined over heads."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(num_queries, 4, 8, generator=generator)
    keys = torch.randn(9, 2, 8, generator=generator)
    by_head = torch.zeros(4, 9)
    for head in range(4):
        for back in range(num_queries):
            seen = 9 - (num_queries - 1 - back)
            logits = keys[:seen, head // 2] @ queries[back, head] * 8**-0.5
            by_head[head, :seen] += torch.softmax(logits, dim=0) / num_queries
    expect = by_head.sum(dim=0) if heads == "mean" else by_head.amax(dim=0)
    found = last_prompt_rows(queries, keys, 8**-0.5, heads)
    torch.testing.assert_close(found, expect)
    if num_queries == 1 and heads == "mean":
        torch.testing.assert_close(found, last_prompt_row(queries[0], keys, 8**-0.5))


@pytest.mark.parametrize("sizes", [(20,), (20, 7), (3, 3, 3)])
def test_scheduler_and_worker_agree(sizes):
    """The manager's length of a live request is the plan's, for every group and every token."""
    offset, images = 2, []
    for size in sizes:
        images.append(feature(offset, size))
        offset += size + 1
    request = make_request("r", offset + 5, images)
    spans = visual_spans(request)
    assert spans.sizes == sizes
    schedule = RerouteOptions(schedule="nuwa", tier=128).resolve(8)
    routing = RequestRouting.of(
        spans, request.prompt_token_ids, schedule.ratios, schedule.encoder_ratio
    )
    for computed, scheduled in ((0, request.num_prompt_tokens), (request.num_prompt_tokens, 1)):
        step = plan_step(np.array([computed]), np.array([scheduled]), [routing], schedule.ratios)
        for ratio in schedule.ratios:
            spec = RoutedAttentionSpec(
                block_size=16,
                num_kv_heads=1,
                head_size=32,
                dtype=torch.float32,
                keep_ratio=ratio,
                encoder_ratio=schedule.encoder_ratio,
                num_layers=4,
            )
            length = routed_length(computed + scheduled, spans, spec.keep_ratio, spec.encoder_ratio)
            assert int(step.lengths[ratio].seq_lens[0]) == length
