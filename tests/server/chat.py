"""Talking to a routed server as a client does, and what its answers must be."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import torch
from PIL import Image
from transformers import AutoProcessor

from benchmarks.photos import PHOTOS
from tests.oracle import RoutedOracle
from vllm_reroute.explain.trace import trace_of
from vllm_reroute.schedule import RerouteOptions, RoutingSchedule

MODEL_NAME = "tiny"
MAX_TOKENS = 8


def messages(
    text: str, photos: tuple[int, ...] = (), image: bytes | None = None
) -> list[dict[str, Any]]:
    pictures = [PHOTOS[i].jpeg for i in photos] if image is None else [image]
    parts: list[dict[str, Any]] = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(p).decode()}"},
        }
        for p in pictures
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def ask(client: openai.OpenAI, text: str, photos: tuple[int, ...] = (), **options: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL_NAME,
        messages=messages(text, photos),
        temperature=0,
        max_tokens=MAX_TOKENS,
        extra_body={"return_token_ids": True, "ignore_eos": True, **options},
    )


def kept(answer: Any, schedule: RoutingSchedule) -> list[list[list[int]]]:
    """What each decision kept, as every choice of the answer says."""
    told = [choice.routed_experts for choice in answer.choices]
    traces = [trace_of(one, schedule, len(answer.prompt_token_ids)) for one in told]
    return [[decision.kept.tolist() for decision in trace.decisions] for trace in traces]


def check_concurrent_answers(client: openai.OpenAI, model: Path, depth: int) -> None:
    """Images, two images and text at once; every answer is the one `pdrop` at tier 128 defines."""
    check_answers(
        client,
        model,
        depth,
        [
            ("What is shown?", (0,)),
            ("Which animal is this?", (1,)),
            ("How many birds fly over the field?", ()),
            ("Which of the two has the cup?", (2, 3)),
            ("Describe the photo in one sentence.", (3,)),
        ],
    )


def check_answers(
    client: openai.OpenAI,
    model: Path,
    depth: int,
    asks: list[tuple[str, tuple[int, ...]]],
    tier: int = 128,
    **options: Any,
) -> list[Any]:
    """The answers to these questions, asked at once; each is the one `pdrop` at that tier defines."""
    schedule = RerouteOptions(schedule="pdrop", tier=tier).resolve(depth)
    oracle = RoutedOracle(model, action=schedule.action, layers=schedule.layers, keep=schedule.keep)
    processor = AutoProcessor.from_pretrained(model)
    with ThreadPoolExecutor(len(asks)) as pool:
        answers = list(pool.map(lambda one: ask(client, *one, **options), asks))
    for (_, photos), answer in zip(asks, answers, strict=True):
        inputs = {"input_ids": torch.tensor([answer.prompt_token_ids])}
        if photos:
            images = [Image.open(BytesIO(PHOTOS[i].jpeg)).convert("RGB") for i in photos]
            inputs |= processor.image_processor(images, return_tensors="pt")
        expected = oracle.run(inputs, MAX_TOKENS)
        assert answer.choices[0].token_ids == expected.token_ids
        if "reroute_explain" in options.get("vllm_xargs", {}):
            assert kept(answer, schedule) == [expected.selected]
    return answers
