"""The trace of a request is what the oracle decides, with the scores it was decided by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.local_models import build_family
from tests.engine.family_requests import FamilyAsk, processor
from tests.engine.oracle_answers import OracleAnswers
from tests.oracle.family_requests import FRAMES_PER_SECOND, image, video
from vllm_reroute.explain.pictures import image_of, video_of
from vllm_reroute.explain.question import Question
from vllm_reroute.explain.record import trace_request
from vllm_reroute.schedule import RerouteOptions

ENGINE = (
    "--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", str(2**25),
)  # fmt: skip
# The prompt does not fit a step: what is decided about has waited in parked pages.
CHUNKS = ("--max-num-batched-tokens", "100")
OPTIONS = {
    # Ratios fall and rise again; the second decision has nothing to defer.
    "reroute": {"layers": (3, 4, 6), "keep": (0.5, 1.0, 0.2)},
    "remove": {"layers": (3, 4, 6), "keep": (0.5, 0.5, 0.2), "action": "remove"},
}
WORDS = "What is new?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_family(tmp_path_factory.mktemp("explain") / "qwen2.5-vl", "qwen2.5-vl")


@pytest.mark.parametrize("action,flags", [("remove", ()), ("reroute", CHUNKS)], ids=str)
def test_trace_agrees_with_oracle(folder: Path, action: str, flags: tuple[str, ...]) -> None:
    """An image and a video in one prompt."""
    frames = video(1)
    times = {
        "total_num_frames": len(frames),
        "fps": FRAMES_PER_SECOND,
        "frames_indices": list(range(len(frames))),
    }
    question = Question(
        model=str(folder),
        text=WORDS,
        pictures=(image_of("a.png", image(0)), video_of("b.mp4", frames, times)),
        max_tokens=4,
        engine_flags=(*ENGINE, *flags),
    )
    trace, text = trace_request(question, OPTIONS[action])

    ask = FamilyAsk(folder, (("image", 0), ("video", 1), ("text", WORDS)), max_tokens=4)
    prompt = ask.inputs(processor(folder))["input_ids"][0].tolist()
    schedule = RerouteOptions.from_mapping(OPTIONS[action]).resolve(8)
    expected = OracleAnswers({"qwen2.5-vl": folder}).result("qwen2.5-vl", schedule, ask, prompt)
    assert trace.num_prompt == len(prompt) > 100
    assert [decision.kept.tolist() for decision in trace.decisions] == expected.selected
    assert [(d.layer, d.end_layer) for d in trace.decisions] == [(3, 4), (4, 6), (6, 8)]
    assert text == processor(folder).decode(expected.token_ids, skip_special_tokens=True)

    candidates = set(range(trace.num_visual))
    for decision in trace.decisions:
        kept = set(decision.kept.tolist())
        if kept == candidates:
            assert decision.scores is None
            continue
        assert decision.scores.dtype == np.float32
        assert set(np.flatnonzero(~np.isnan(decision.scores)).tolist()) == candidates
        # What was kept had the highest scores.
        lowest = decision.scores[decision.kept].min()
        assert decision.scores[sorted(candidates - kept)].max() <= lowest
        candidates = kept if action == "remove" else candidates
