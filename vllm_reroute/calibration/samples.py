"""Questions with pictures, read from a JSONL file."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import ProcessorMixin
    from transformers.video_utils import VideoMetadata

FEWEST = 4
"""Below this there are no two halves of which one could check the other."""

MOST_FRAMES = 32
"""Of a video, vLLM's default."""

FORMAT = (
    'Give {"prompt": "…", "image_files": ["…"]} or {"content": [{"type": "image", "image": "…"}, '
    '{"type": "text", "text": "…"}]}.'
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question. parts: ("text", words), ("image", file's bytes) or ("video", path), in order."""

    line: int
    parts: tuple[tuple[str, Any], ...]

    @property
    def digest(self) -> str:
        """SHA-256 of everything that is asked, pictures by their bytes."""
        digest = hashlib.sha256()
        for kind, value in self.parts:
            data = Path(value).read_bytes() if kind == "video" else value
            data = data.encode() if isinstance(data, str) else data
            digest.update(f"{kind} {len(data)}\0".encode())
            digest.update(data)
        return digest.hexdigest()


def digest_of(samples: Sequence[Sample]) -> str:
    """SHA-256 of all samples, whatever their order."""
    return hashlib.sha256("".join(sorted(s.digest for s in samples)).encode()).hexdigest()


def read_samples(path: Path) -> list[Sample]:
    """The file's samples, without repetitions; paths in it are relative to its folder.

    The format is that of `vllm bench serve --dataset-name custom_image`; a content part may also be
    {"type": "video", "video": path}. Raises ValueError, naming the line, for anything else.
    """
    if not path.is_file():
        raise ValueError(f"--samples {path} is not a file. {FORMAT}")
    found: dict[str, Sample] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                sample = Sample(line=number, parts=_parts(json.loads(line), path.parent))
            except (ValueError, OSError) as error:
                raise ValueError(f"--samples {path}, line {number}: {error}") from error
            found.setdefault(sample.digest, sample)
    if len(found) < FEWEST:
        raise ValueError(
            f"--samples {path} has {len(found)} different questions. Allowed: {FEWEST} or more; 20 to "
            "200 are enough."
        )
    return list(found.values())


def _parts(item: Any, folder: Path) -> tuple[tuple[str, Any], ...]:
    if not isinstance(item, Mapping):
        raise ValueError(f"not a JSON object. {FORMAT}")
    if "content" in item:
        content = item["content"]
    elif "prompt" in item and "image_files" in item:
        content = [{"type": "image", "image": file} for file in item["image_files"]]
        content.append({"type": "text", "text": item["prompt"]})
    else:
        raise ValueError(f"neither 'prompt' and 'image_files' nor 'content'. {FORMAT}")
    if not isinstance(content, list):
        raise ValueError(f"'content' must be a list. {FORMAT}")
    parts = tuple(_part(part, folder) for part in content)
    if not any(kind != "text" for kind, _ in parts):
        raise ValueError("no image or video: nothing of it would be routed.")
    return parts


def _part(part: Any, folder: Path) -> tuple[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return "text", part["text"]
    if kind == "image" and isinstance(part.get("image"), str):
        return "image", _picture(part["image"], folder)
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if isinstance(url, str):
            return "image", _picture(url, folder)
    if kind == "video" and isinstance(part.get("video"), str):
        return "video", str(_existing(part["video"], folder))
    raise ValueError(f"the part {str(part)[:80]!r} is not understood. {FORMAT}")


def _picture(name: str, folder: Path) -> bytes:
    if name.startswith("data:"):
        try:
            return base64.b64decode(name.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise ValueError(f"its data URL is not base64 ({error}).") from error
    return _existing(name, folder).read_bytes()


def _existing(name: str, folder: Path) -> Path:
    if name.startswith(("http://", "https://")):
        raise ValueError(f"{name} is on the network. Download it and name the file.")
    path = folder / (unquote(name.removeprefix("file://")))
    if not path.is_file():
        raise ValueError(f"{path} is not there.")
    return path


def prepare(sample: Sample, processor: ProcessorMixin) -> Mapping[str, torch.Tensor]:
    """What the model's processor makes of one user message, ready to be answered."""
    from PIL import Image

    content = [
        {"type": kind, "text": value} if kind == "text" else {"type": kind}
        for kind, value in sample.parts
    ]
    message: dict[str, Any] = {"role": "user", "content": content}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    options: dict[str, Any] = {}
    pictures = [
        Image.open(io.BytesIO(value)).convert("RGB")
        for kind, value in sample.parts
        if kind == "image"
    ]
    if pictures:
        options["images"] = pictures
    if paths := [value for kind, value in sample.parts if kind == "video"]:
        frames, times = zip(*(_frames(path) for path in paths), strict=True)
        options |= {"videos": list(frames), "video_metadata": list(times)}
        options["do_sample_frames"] = False
    # As vLLM's chat endpoint: the template has written every special token there is to be.
    return processor(text=[text], add_special_tokens=False, return_tensors="pt", **options)


def _frames(path: str) -> tuple[np.ndarray, VideoMetadata]:
    """Evenly spread frames [frames, height, width, 3] and their times, read with OpenCV as vLLM does."""
    from transformers.video_utils import load_video

    def evenly(metadata: VideoMetadata, **_: object) -> np.ndarray:
        total = metadata.total_num_frames
        return np.linspace(0, total - 1, min(MOST_FRAMES, total), dtype=int)

    # It takes paths and returns both, which its annotations do not say.
    read: Any = load_video
    return read(path, backend="opencv", sample_indices_fn=evenly)
