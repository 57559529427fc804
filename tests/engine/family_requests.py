"""Requests in each family's own chat format, for the engine and for the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from tests.engine.requests import MAX_TOKENS, greedy
from tests.oracle.family_requests import FRAMES_PER_SECOND, image, video


@dataclass(frozen=True)
class FamilyAsk:
    """A conversation. parts: ("image", n), ("video", n) or ("text", words), in order; ("answer", words)
    ends a user message that is not the last.

    explain: whether it asks what was decided.
    """

    folder: Path
    parts: tuple[tuple[str, Any], ...]
    max_tokens: int = MAX_TOKENS
    options: dict[str, Any] = field(default_factory=dict)
    explain: bool = True

    @property
    def key(self) -> Any:
        return (self.parts, self.max_tokens)

    @property
    def visual(self) -> bool:
        """Whether anything of it is routed."""
        return any(kind in ("image", "video") for kind, _ in self.parts)

    def text(self) -> str:
        """The conversation in the checkpoint's chat template."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": []}]
        for kind, value in self.parts:
            if kind == "answer":
                said = [{"type": "text", "text": value}]
                messages += [
                    {"role": "assistant", "content": said},
                    {"role": "user", "content": []},
                ]
            else:
                part = {"type": kind, "text": value} if kind == "text" else {"type": kind}
                messages[-1]["content"].append(part)
        return processor(self.folder).apply_chat_template(messages, add_generation_prompt=True)

    def prompt(self) -> dict[str, Any]:
        """As `LLM.generate` takes it."""
        data: dict[str, Any] = {}
        if images := self._pictures():
            data["image"] = images
        if videos := self._videos():
            data["video"] = [(frames, _times(frames)) for frames in videos]
        prompt: dict[str, Any] = {"prompt": self.text()}
        return {**prompt, "multi_modal_data": data} if data else prompt

    def inputs(self, processor: Any) -> Mapping[str, Any]:
        """As the family's own processor prepares it, for the oracle."""
        options: dict[str, Any] = {}
        if images := self._pictures():
            options["images"] = images
        if videos := self._videos():
            options["videos"] = videos
            options["do_sample_frames"] = False
            options["video_metadata"] = [VideoMetadata(**_times(frames)) for frames in videos]
        return processor(text=[self.text()], return_tensors="pt", **options)

    def sampling_params(self) -> Any:
        return greedy(self.max_tokens, self.options, self.explain)

    def _pictures(self) -> list[Any]:
        return [image(number) for kind, number in self.parts if kind == "image"]

    def _videos(self) -> list[Any]:
        return [video(number) for kind, number in self.parts if kind == "video"]


@cache
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


def _times(frames: Any) -> dict[str, Any]:
    return {
        "total_num_frames": len(frames),
        "fps": FRAMES_PER_SECOND,
        "frames_indices": list(range(len(frames))),
    }
