"""What is asked, of which model, about which pictures."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_reroute.explain.pictures import Picture


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request, to be asked of a routed and of a stock engine.

    model: Hugging Face id or folder. pictures: images first, then videos, as the prompt has them.
    engine_flags: words of the command line that are vLLM's own engine flags.
    """

    model: str
    text: str
    pictures: tuple[Picture, ...]
    max_tokens: int
    engine_flags: tuple[str, ...] = ()

    @property
    def images(self) -> list[Picture]:
        return [picture for picture in self.pictures if not picture.is_video]

    @property
    def videos(self) -> list[Picture]:
        return [picture for picture in self.pictures if picture.is_video]
