"""Every family answers exactly as the plain-transformers oracle: images, several images, videos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.local_models import FamilyShape, build_family
from tests.engine.conftest import engine_args
from tests.engine.family_requests import FamilyAsk, processor
from tests.engine.host import EngineHost
from tests.engine.oracle_answers import OracleAnswers
from tests.engine.probes import generate, kv_lens, stepwise, turn_marker
from tests.engine.runners import on_runners
from vllm_reroute.schedule import RerouteOptions

DEPTH = 8
WITH_VIDEO = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava-onevision")
FAMILIES = (*WITH_VIDEO, "llava-next")
# How a prompt asks the assistant to speak. Llava-OneVision's template writes a space behind the word once it has.
MARKERS = {
    "qwen2-vl": "<|im_start|>assistant\n",
    "qwen2.5-vl": "<|im_start|>assistant\n",
    "qwen3-vl": "<|im_start|>assistant\n",
    "llava-onevision": "<|im_start|>assistant",
    "llava-next": " [/INST]",
}
EVERY = {family: [family] for family in FAMILIES}
# Ratios fall and rise again. Qwen3-VL's deepstack is in at layer 2, where the published one starts.
REROUTE = {"layers": [3, 4, 6], "keep": [0.5, 0.2, 0.35]}
REMOVE = {"schedule": "pdrop", "action": "remove", "tier": 128}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: build_family(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def oracles(folders: dict[str, Path]) -> OracleAnswers:
    return OracleAnswers(folders)


def requests(family: str, folder: Path) -> list[FamilyAsk]:
    """One image, two images with text between, text alone, and videos where there are any."""
    messages = [
        (("image", 0), ("text", "What is shown in this image?")),
        (("text", "first"), ("image", 1), ("text", "and"), ("image", 2), ("text", "differ how?")),
        (("text", "Count the birds over the field and name the season."),),
    ]
    if family in WITH_VIDEO:
        messages += [
            (("video", 0), ("text", "What happens here?")),
            (("image", 1), ("text", "then"), ("video", 1), ("text", "what is new in it?")),
        ]
    return [FamilyAsk(folder, tuple(parts), max_tokens=12) for parts in messages]


def family_engine(folder: Path, reroute: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    limits = {"image": 2, "video": 1} if "next" not in folder.name else {"image": 2}
    args = {"max_model_len": 1024, "max_num_batched_tokens": 1100, "limit_mm_per_prompt": limits}
    return engine_args(folder, reroute, **{**args, **changes})


def check(
    host: EngineHost,
    folders: dict[str, Path],
    oracles: OracleAnswers,
    family: str,
    options: dict[str, Any],
) -> None:
    schedule = RerouteOptions.from_mapping(options).resolve(DEPTH)
    host.engine(**family_engine(folders[family], options))
    asks = requests(family, folders[family])
    for ask, answer in zip(asks, host.call(generate, asks), strict=True):
        oracles.check(family, schedule, ask, answer)


@on_runners("family", EVERY, v2=["llava-next", "llava-onevision", "qwen2-vl"])
def test_rerouted_family_agrees_with_oracle(
    host: EngineHost, folders: dict[str, Path], oracles: OracleAnswers, family: str
) -> None:
    check(host, folders, oracles, family, REROUTE)


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_family_agrees_with_oracle(
    v1: EngineHost, folders: dict[str, Path], oracles: OracleAnswers, family: str
) -> None:
    """And every layer holds as much K/V as the oracle's, the decoded tokens included."""
    check(v1, folders, oracles, family, REMOVE)
    schedule = RerouteOptions.from_mapping(REMOVE).resolve(DEPTH)
    asks = requests(family, folders[family])
    for ask, lens in zip(asks, v1.call(kv_lens, asks), strict=True):
        prompt = ask.inputs(processor(folders[family]))["input_ids"][0].tolist()
        assert lens == oracles.result(family, schedule, ask, prompt).kv_lens


def conversation(family: str, folder: Path, history: str) -> list[FamilyAsk]:
    """Three turns, each with all before it; the second brings another picture, the third asks about both."""
    other = "video" if family in WITH_VIDEO else "image"
    parts = (
        ("image", 0),
        ("text", "What is shown in this image?"),
        ("answer", "A cup."),
        ("text", "And in this one?"),
        (other, 1),
        ("answer", "Boats on the lake."),
        ("text", "Which of both is older?"),
    )
    own = {"extra_args": {"reroute": {"history": history}}}
    return [
        FamilyAsk(folder, parts[:end], max_tokens=12, options=own, explain=False)
        for end in (2, 5, 7)
    ]


@on_runners("family", EVERY, v2=["qwen2.5-vl", "qwen3-vl"])
def test_family_in_chunks_and_from_the_cache_agrees_with_oracle(
    host: EngineHost, folders: dict[str, Path], oracles: OracleAnswers, family: str
) -> None:
    """Steps of 96 tokens, together; then one by one, each finding its own prompt of before. Then a
    conversation that keeps its choice, and one whose last question adds to it, turn by turn and all turns at
    once, telling what each keeps."""
    folder = folders[family]
    options = {**REROUTE, "turn_marker": MARKERS[family]}
    schedule = RerouteOptions.from_mapping(options).resolve(DEPTH)
    steps = {"max_num_batched_tokens": 96, "max_num_seqs": 16, "enable_prefix_caching": True}
    host.engine(**family_engine(folder, options, **steps))
    oracles.check_together_and_cached(host, family, schedule, requests(family, folder))

    for history in ("keep", "recall"):
        keeps = replace(schedule, history=history, marker=host.call(turn_marker))
        talk, cached = conversation(family, folder, history), []
        for ask in talk:
            (answer,) = host.call(generate, [ask])
            oracles.check_tokens(family, keeps, ask, answer)
            cached.append(answer.num_cached)
        # The first turn finds what requests that rank again have left of its picture.
        assert 0 < cached[0] < cached[1] < cached[2]
        talk = [replace(ask, explain=True) for ask in talk]
        for ask, answer in zip(talk, host.call(generate, talk), strict=True):
            oracles.check_tokens(family, keeps, ask, answer)


def num_compiled_stages(llm: Any) -> int:
    from vllm.compilation.counter import compilation_counter

    return compilation_counter.num_models_seen


def test_compiled_deepstack_agrees_with_oracle(v1: EngineHost, tmp_path: Path) -> None:
    """Every stage is compiled; the first one takes image features along, the others never do.

    Compiling takes time by layer: there are five.
    """
    family, options = "qwen3-vl", {"layers": [3, 4], "keep": [0.2, 0.5]}
    folder = build_family(tmp_path / family, family, FamilyShape(text_layers=5))
    oracles = OracleAnswers({family: folder})
    schedule = RerouteOptions.from_mapping(options).resolve(5)
    before = v1.engine(**family_engine(folder, options)).call(num_compiled_stages)
    v1.engine(**family_engine(folder, options, enforce_eager=False))
    # The stock model class counts once more, but is never called.
    assert v1.call(num_compiled_stages) - before >= len(schedule.stages) == 3
    asks = requests(family, folder)
    for ask, answer in zip(asks, v1.call(generate, asks), strict=True):
        oracles.check(family, schedule, ask, answer)


def test_preempted_request_keeps_its_positions(
    v1: EngineHost, folders: dict[str, Path], oracles: OracleAnswers
) -> None:
    """Resumed with M-RoPE: three position components for the prompt, one more for every token
    generated before, and the decisions of the first time."""
    family = "qwen2.5-vl"
    asks = [replace(ask, max_tokens=64) for ask in requests(family, folders[family])]
    schedule = RerouteOptions.from_mapping(REROUTE).resolve(DEPTH)
    # K and V of 32 tokens, 2 heads of 32 values, fp32: a block of one layer.
    block_bytes = 32 * 2 * 2 * 32 * 4
    room = family_engine(
        folders[family], REROUTE, kv_cache_memory_bytes=165 * block_bytes, max_model_len=400
    )
    seen = v1.engine(**room).call(stepwise, asks, every=1)
    assert seen["preempted"] >= 1
    answers = zip(asks, seen["tokens"], seen["prompts"], seen["decisions"], strict=True)
    for ask, tokens, prompt, kept in answers:
        expected = oracles.result(family, schedule, ask, prompt)
        assert tokens == expected.token_ids
        if ask.visual:
            assert kept == expected.selected
