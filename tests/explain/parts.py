"""Explanations made up for tests: real processors and geometry, decisions by chance, no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoProcessor

from benchmarks.photos import PHOTOS
from vllm_reroute.explain.explanation import Explanation
from vllm_reroute.explain.geometry import patches_of
from vllm_reroute.explain.pictures import Picture, image_of, video_of
from vllm_reroute.explain.question import Question
from vllm_reroute.explain.trace import RoutingTrace, TracedDecision
from vllm_reroute.schedule import RerouteOptions

LAYERS, KEEP = (3, 4, 6), (0.5, 0.2, 0.35)
NUM_LAYERS = 8


def photo(number: int, width: int = 400, height: int = 300) -> Picture:
    return image_of(f"{PHOTOS[number].name}.jpg", PHOTOS[number].image.crop((0, 0, width, height)))


def clip(num_frames: int = 5) -> Picture:
    pixels = np.asarray(PHOTOS[1].image)
    frames = np.stack([pixels[20 + 8 * t : 160 + 8 * t, 60:260] for t in range(num_frames)])
    times = {"total_num_frames": num_frames, "fps": 2.0, "frames_indices": list(range(num_frames))}
    return video_of("clip.mp4", frames, times)


def explanation(
    folder: Path, pictures: list[Picture], *, action: str | None = None, **changes: Any
) -> Explanation:
    """Of a checkpoint's way of looking; `remove` lets nothing come back."""
    patches = patches_of(
        AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder), pictures
    )
    keep = tuple(np.minimum.accumulate(KEEP)) if action == "remove" else KEEP
    question = Question(
        model=str(folder), text="What is shown here?", pictures=tuple(pictures), max_tokens=8
    )
    made: dict[str, Any] = {
        "question": question,
        "options": RerouteOptions(layers=LAYERS, keep=keep, action=action),
        "trace": chance_trace(tuple(map(len, patches)), keep, removes=action == "remove"),
        "patches": tuple(patches),
        "routed_answer": "A cat.",
        "dense_answer": "A cat, close by.",
    }
    return Explanation(**{**made, **changes})


def chance_trace(
    sizes: tuple[int, ...], keep: tuple[float, ...], *, removes: bool = False
) -> RoutingTrace:
    """Each decision keeps the candidates of the highest of random scores."""
    chance = np.random.default_rng(0)
    num_visual = sum(sizes)
    candidates = np.arange(num_visual)
    decisions = []
    for layer, end_layer, ratio in zip(LAYERS, (*LAYERS[1:], NUM_LAYERS), keep, strict=True):
        scores = np.full(num_visual, np.nan, dtype=np.float32)
        scores[candidates] = chance.random(len(candidates))
        best = np.argsort(-np.nan_to_num(scores, nan=-1), kind="stable")
        kept = np.sort(best[: int(num_visual * ratio)])
        decisions.append(TracedDecision(layer=layer, end_layer=end_layer, kept=kept, scores=scores))
        candidates = kept if removes else candidates
    return RoutingTrace(
        num_prompt=num_visual + 20, num_visual=num_visual, decisions=tuple(decisions)
    )
