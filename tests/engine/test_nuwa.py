"""Nüwa in the engine: each image's anchors, wherever it comes from and whatever is beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from benchmarks.local_model import build_local_model
from benchmarks.local_models import build_family
from tests.engine.conftest import GROUPED, engine_args
from tests.engine.family_requests import FamilyAsk
from tests.engine.host import EngineHost
from tests.engine.oracle_answers import OracleAnswers
from tests.engine.probes import free_blocks, generate, generate_one_by_one, stepwise
from tests.engine.requests import (
    LONG_TEXT,
    MIXED,
    ONE_IMAGE,
    OTHER_IMAGE,
    TEXT_ONLY,
    TWO_IMAGES,
    Answer,
)
from tests.engine.runners import on_runners
from tests.engine.test_continuous_batching import live_blocks
from vllm_reroute.schedule import RerouteOptions, RoutingSchedule
from vllm_reroute.schedule.footprint import RequestFootprint

DEPTH = 8
KINDS: list[dict[str, Any]] = [
    {"schedule": "nuwa", "action": "remove", "tier": 192},
    {"schedule": "nuwa", "action": "remove", "budget": 100},
    {"schedule": "nuwa", "variant": "A", "tier": 64},
    {"schedule": "nuwa", "variant": "B", "tier": 192},
]
CHEAP: dict[str, Any] = {"schedule": "nuwa", "variant": "A", "tier": 128}
QWEN, LLAVA = "qwen2.5-vl", "llava-1.5"


def label(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


@pytest.fixture(scope="module")
def folders(models: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("nuwa")
    return {LLAVA: models["grouped"], QWEN: build_family(root / QWEN, QWEN)}


@pytest.fixture(scope="module")
def oracles(folders: dict[str, Path]) -> OracleAnswers:
    return OracleAnswers(folders)


def requests(model: str, folder: Path) -> list[Any]:
    """One image, text, two images (the second of them also alone), in one batch."""
    if model == LLAVA:
        return [ONE_IMAGE, TEXT_ONLY, TWO_IMAGES, LONG_TEXT, OTHER_IMAGE]
    messages = (
        (("image", 0), ("text", "What is shown in this image?")),
        (("text", "Count the birds over the field and name the season."),),
        (("image", 2), ("text", "and"), ("image", 1), ("text", "differ how?")),
        (("text", "Say hello to all of the birds."),),
        (("image", 1), ("text", "Describe it, please.")),
    )
    return [FamilyAsk(folder, parts, max_tokens=12) for parts in messages]


def schedule_of(options: dict[str, Any]) -> RoutingSchedule:
    return RerouteOptions.from_mapping(options).resolve(DEPTH)


def image_sizes(folder: Path, ask: Any) -> list[int]:
    """Visual tokens of each image of a request."""
    if not ask.visual:
        return []
    inputs = ask.inputs(AutoProcessor.from_pretrained(folder))
    if "image_grid_thw" in inputs:
        return (inputs["image_grid_thw"].prod(dim=-1) // 4).tolist()
    return [GROUPED.visual_tokens] * len(inputs["pixel_values"])


def check_decisions(schedule: RoutingSchedule, sizes: list[int], answer: Answer) -> None:
    """As many as planned, each image its own share at first, and nothing comes back from removal."""
    if not sizes:
        assert answer.selected == []
        return
    kept = schedule.kept_per_stage(*sizes)
    assert [len(selected) for selected in answer.selected] == kept
    start = 0
    for size in sizes:
        own = [token for token in answer.selected[0] if start <= token < start + size]
        assert len(own) == schedule.kept_per_stage(size)[0]
        start += size
    first, *later = (set(selected) for selected in answer.selected)
    if schedule.variant == "B":
        assert any(not selected <= first for selected in later)
    else:
        assert all(selected <= first for selected in later)


@on_runners(
    "model, options",
    {f"{label(kind)}-{model}": [model, kind] for kind in KINDS for model in (LLAVA, QWEN)},
    v2=["nuwa-remove-192-qwen2.5-vl", "nuwa-B-192-llava-1.5"],
)
def test_a_mixed_batch_answers_as_the_oracle_and_as_each_request_alone(
    host: EngineHost,
    folders: dict[str, Path],
    oracles: OracleAnswers,
    model: str,
    options: dict[str, Any],
) -> None:
    """Anchors, later decisions, tokens and log-probabilities."""
    host.engine(**engine_args(folders[model], options))
    asks, before = requests(model, folders[model]), host.call(free_blocks)
    together, alone = host.call(generate, asks), host.call(generate_one_by_one, asks)
    for ask, answer in zip(asks, together, strict=True):
        oracles.check(model, schedule_of(options), ask, answer)
    sizes = [image_sizes(folders[model], ask) for ask in asks]
    for own_sizes, one, other in zip(sizes, together, alone, strict=True):
        check_decisions(schedule_of(options), own_sizes, one)
        assert one.selected == other.selected
        assert one.token_ids == other.token_ids
    first_image = sizes[2][0]
    beside = [token - first_image for token in together[2].selected[0] if token >= first_image]
    assert beside == together[4].selected[0], "anchors do not depend on the image beside"
    assert host.call(free_blocks) == before


@on_runners(
    "model, options",
    {
        f"{label(kind)}-{model}": [model, kind]
        for kind in (KINDS[0], KINDS[3])
        for model in (LLAVA, QWEN)
    },
    v2=["nuwa-B-192-qwen2.5-vl"],
)
def test_chunks_and_cached_embeddings_change_no_answer(
    host: EngineHost,
    folders: dict[str, Path],
    oracles: OracleAnswers,
    model: str,
    options: dict[str, Any],
) -> None:
    """Embeddings wait in pages with what the vision encoder decided about them."""
    steps = {"max_num_batched_tokens": 48, "max_num_seqs": 16, "enable_prefix_caching": True}
    host.engine(**engine_args(folders[model], options, **steps))
    asks = requests(model, folders[model])
    oracles.check_together_and_cached(host, model, schedule_of(options), asks)


def encoded_images(llm: Any, ask: Any, times: int) -> tuple[list[Any], int]:
    """The same request several times, one after the other: answers, and images encoded."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    model_class = type(worker.model_runner.get_model())
    encode, encoded = model_class.embed_multimodal, 0

    def counting(self: Any, **inputs: Any) -> Any:
        nonlocal encoded
        rows = encode(self, **inputs)
        encoded += len(rows)
        return rows

    model_class.embed_multimodal = counting
    try:
        answers = [generate(llm, [ask])[0] for _ in range(times)]
    finally:
        model_class.embed_multimodal = encode
    return answers, encoded


@on_runners("model", {LLAVA: [LLAVA], QWEN: [QWEN]}, v2=[QWEN])
def test_an_image_of_the_encoder_cache_decides_as_a_fresh_one(
    host: EngineHost, folders: dict[str, Path], model: str
) -> None:
    host.engine(**engine_args(folders[model], CHEAP, mm_processor_cache_gb=1))
    ask = requests(model, folders[model])[0]
    answers, encoded = host.call(encoded_images, replace(ask, max_tokens=7), 3)
    assert encoded <= 1, "later ones come from the cache"
    for answer in answers[1:]:
        assert answer.selected == answers[0].selected
        assert answer.logprobs == answers[0].logprobs


@pytest.mark.parametrize("model", [LLAVA, QWEN])
def test_no_layer_holds_blocks_for_a_rejected_token(
    v1: EngineHost, folders: dict[str, Path], model: str
) -> None:
    """From layer 0 on: text and anchors, then text and the kept ones; an abort frees them all."""
    v1.engine(**engine_args(folders[model], CHEAP))
    before = v1.call(free_blocks)
    for ask in requests(model, folders[model])[:3]:
        sizes = image_sizes(folders[model], ask)
        held, computed, after = v1.call(live_blocks, replace(ask, max_tokens=60), 40)
        footprint = RequestFootprint(
            schedule=schedule_of(CHEAP),
            num_visual=sum(sizes),
            image_sizes=tuple(sizes) or (0,),
            num_text=computed - sum(sizes),
            bytes_per_token=1,
            block_size=32,
        )
        assert held == footprint.routed_blocks
        assert after == before


def test_preempted_requests_repeat_their_decisions(v1: EngineHost, folders: Any) -> None:
    """In a pool too small for all, images are decided on again, from the encoder or its cache."""
    asks = tuple(
        replace(ask, text=f"SYSTEM: {'be kind ' * more}{ask.text}", max_tokens=96)
        for more in (1, 3)
        for ask in MIXED
    )
    v1.engine(**engine_args(folders[LLAVA], CHEAP))
    seen = v1.call(stepwise, asks, every=1)
    # K and V of 32 tokens, 2 heads of 32 values, fp32: a block of one layer.
    pool = 220 * 32 * 2 * 2 * 32 * 4
    v1.engine(**engine_args(folders[LLAVA], CHEAP, kv_cache_memory_bytes=pool, max_model_len=480))
    again = v1.call(stepwise, asks, every=1)
    assert again["preempted"] >= 2
    assert [again[what] for what in ("tokens", "decisions")] == [seen["tokens"], seen["decisions"]]


def test_a_video_is_refused(v1: EngineHost, folders: dict[str, Path]) -> None:
    limits = {"image": 1, "video": 1}
    v1.engine(
        **engine_args(
            folders[QWEN],
            CHEAP,
            limit_mm_per_prompt=limits,
            max_model_len=1024,
            max_num_batched_tokens=1100,
        )
    )
    ask = FamilyAsk(folders[QWEN], (("video", 0), ("text", "What happens here?")))
    with pytest.raises(Exception, match="Videos are not available under --reroute-schedule nuwa"):
        v1.call(generate, [ask])


def test_compiled_stages_answer_as_eager_ones(v1: EngineHost, tmp_path: Path) -> None:
    """Also the piece between the layer that scores and the one it decides for.

    Compiling takes time by layer: there are four, two before the decoder's decision.
    """
    folder = build_local_model(tmp_path / "shallow", replace(GROUPED, text_layers=4))
    asks = [ask for ask in MIXED if ask.images]
    v1.engine(**engine_args(folder, KINDS[0]))
    eager = v1.call(generate, asks)
    v1.engine(**engine_args(folder, KINDS[0], enforce_eager=False))
    for one, other in zip(eager, v1.call(generate, asks), strict=True):
        assert (one.token_ids, one.selected) == (other.token_ids, other.selected)


def test_tensor_parallel_ranks_choose_alike(v1: EngineHost, folders: dict[str, Path]) -> None:
    """Heads of tower and decoder are split over two ranks; they answer as one rank does."""
    asks = requests(QWEN, folders[QWEN])
    v1.engine(**engine_args(folders[QWEN], KINDS[0]))
    alone = v1.call(generate, asks)
    v1.engine(**engine_args(folders[QWEN], KINDS[0], tensor_parallel_size=2))
    for one, other in zip(alone, v1.call(generate, asks), strict=True):
        assert (one.token_ids, one.selected) == (other.token_ids, other.selected)
