"""Samples of a calibration: what is read, what is refused with its line, and what they become."""

import base64
import io
import json

import cv2
import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from benchmarks.grounding.calibration_samples import write
from benchmarks.grounding.evaluate import MODEL, prompt
from benchmarks.local_models import build_family
from vllm_reroute.calibration.samples import digest_of, prepare, read_samples


def picture(colour, kind="PNG"):
    data = io.BytesIO()
    Image.new("RGB", (30, 40), colour).save(data, format=kind)
    return data.getvalue()


COLOURS = ("red", "green", "blue", "white")


@pytest.fixture
def folder(tmp_path):
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(picture(colour))
    return tmp_path


def saved(folder, *items):
    path = folder / "samples.jsonl"
    path.write_text("".join(f"{i if isinstance(i, str) else json.dumps(i)}\n" for i in items))
    return path


def asked(colour, words="What colour?"):
    return {"prompt": words, "image_files": [f"{colour}.png"]}


FOUR = [asked(colour) for colour in COLOURS]


def test_both_formats_of_vllm_bench_serve_are_read(folder):
    url = "data:image/png;base64," + base64.b64encode(picture("red")).decode()
    interleaved = {
        "content": [
            {"type": "text", "text": "Compare"},
            {"type": "image", "image": str(folder / "red.png")},
            {"type": "text", "text": "and"},
            {"type": "image_url", "image_url": {"url": f"file://{folder}/blue.png"}},
            {"type": "image_url", "image_url": url},
        ],
        "output_tokens": 5,
    }
    samples = read_samples(saved(folder, *FOUR, "", interleaved))
    assert [s.line for s in samples] == [1, 2, 3, 4, 6]
    assert samples[0].parts == (("image", picture("red")), ("text", "What colour?"))
    assert samples[4].parts == (
        ("text", "Compare"),
        ("image", picture("red")),
        ("text", "and"),
        ("image", picture("blue")),
        ("image", picture("red")),
    )


def test_a_digest_is_of_pictures_and_words(folder):
    first = read_samples(saved(folder, *FOUR))
    again = read_samples(saved(folder, *reversed(FOUR), FOUR[0]))
    assert digest_of(first) == digest_of(again) and len(again) == 4
    other_words = read_samples(saved(folder, *FOUR[:3], asked("white", "Which colour?")))
    assert digest_of(other_words) != digest_of(first)
    (folder / "red.png").write_bytes(picture("black"))
    assert digest_of(read_samples(saved(folder, *FOUR))) != digest_of(first)


@pytest.mark.parametrize(
    "line,shown",
    [
        ("{", "Expecting"),
        ("[1]", "not a JSON object"),
        ({"image": "red.png", "question": "x"}, "neither 'prompt' and 'image_files' nor 'content'"),
        ({"content": "x"}, "must be a list"),
        ({"content": [{"type": "text", "text": "x"}]}, "no image or video"),
        ({"content": [{"type": "audio", "audio": "a.wav"}]}, "is not understood"),
        (asked("grey"), "grey.png is not there"),
        ({"prompt": "x", "image_files": ["https://a.b/c.png"]}, "Download it"),
        ({"prompt": "x", "image_files": ["data:image/png;base64,!"]}, "not base64"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_line(folder, line, shown):
    with pytest.raises(ValueError) as refused:
        read_samples(saved(folder, *FOUR, line))
    assert "samples.jsonl, line 5" in str(refused.value) and shown in str(refused.value)


def test_too_few_samples_are_refused(folder):
    with pytest.raises(ValueError, match=r"has 3 different questions. Allowed: 4 or more"):
        read_samples(saved(folder, *FOUR[:3], FOUR[0]))
    with pytest.raises(ValueError, match="is not a file"):
        read_samples(folder / "none.jsonl")


def test_prompts_are_the_chat_templates(tmp_path):
    """With the one start token that it writes, although tokenizing would add another."""
    samples = read_samples(write(tmp_path / "scenes", "validation", 4))
    processor = AutoProcessor.from_pretrained(MODEL)
    inputs = prepare(samples[0], processor)
    ids = inputs["input_ids"][0].tolist()
    words = samples[0].parts[1][1]
    expect = processor(
        text=[prompt(words)],
        images=[Image.open(io.BytesIO(samples[0].parts[0][1]))],
        return_tensors="pt",
    )
    assert ids == expect["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    assert (inputs["pixel_values"] == expect["pixel_values"]).all()


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava-onevision"])
@pytest.mark.parametrize("frames,read", [(8, 8), (70, 32)])
def test_videos_are_read_as_vllm_reads_them(folder, family, frames, read):
    path = folder / "clip.mp4"
    clip = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 4.0, (128, 96))
    for number in range(frames):
        clip.write(np.full((96, 128, 3), 3 * number, dtype=np.uint8))
    clip.release()
    video = {"content": [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "What?"}]}
    sample = read_samples(saved(folder, *FOUR, video))[-1]
    assert sample.parts == (("video", str(path)), ("text", "What?"))
    processor = AutoProcessor.from_pretrained(build_family(folder / family, family))
    inputs = prepare(sample, processor)
    if family == "llava-onevision":
        assert inputs["pixel_values_videos"].shape[1] == read
    else:
        assert int(inputs["video_grid_thw"][0, 0]) == read / 2
    # Every family's own placeholder, as often as the frames have tokens.
    token = processor.tokenizer.convert_tokens_to_ids(processor.video_token)
    assert (inputs["input_ids"] == token).sum() > read / 2
