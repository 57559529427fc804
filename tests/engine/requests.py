"""Requests the engine tests send, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.photos import PHOTOS

MAX_TOKENS = 16


@dataclass(frozen=True)
class Ask:
    """One request. images: indices into the test photographs. text: with one <image> per image.

    Requests of one test have different prompt lengths, which is how their decisions are told
    apart in the engine's records.
    """

    text: str
    images: tuple[int, ...] = ()
    max_tokens: int = MAX_TOKENS
    options: dict[str, Any] = field(default_factory=dict)

    def prompt(self) -> dict[str, Any]:
        """As `LLM.generate` takes it."""
        prompt: dict[str, Any] = {"prompt": self.text}
        if self.images:
            prompt["multi_modal_data"] = {"image": self.pictures()}
        return prompt

    def pictures(self) -> list[Any]:
        return [_cropped(i) for i in self.images]

    def inputs(self, processor: Any) -> Mapping[str, Any]:
        """As transformers' own processor prepares it, for the oracle."""
        images = {"images": self.pictures()} if self.images else {}
        return processor(text=[self.text], return_tensors="pt", **images)

    def sampling_params(self) -> Any:
        return greedy(self.max_tokens, self.options)

    @property
    def key(self) -> Any:
        """What tells it apart from other requests to the same model."""
        return (self.text, self.images, self.max_tokens)

    @property
    def visual(self) -> bool:
        """Whether anything of it is routed."""
        return bool(self.images)


def greedy(max_tokens: int, options: Mapping[str, Any]) -> Any:
    """Sampling parameters that make answers comparable, changed by `options`."""
    from vllm import SamplingParams

    given = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 5}
    return SamplingParams(**{**given, **options})


def _cropped(index: int) -> Any:
    """Photographs, and shifted crops of them for more than there are."""
    picture = PHOTOS[index % len(PHOTOS)].image
    shift = 20 * (index // len(PHOTOS))
    return picture.crop((shift, shift, shift + 300, shift + 300))


ONE_IMAGE = Ask("USER: <image>\nWhat is shown in this image? ASSISTANT:", (0,))
OTHER_IMAGE = Ask("USER: <image>\nDescribe the photo in one sentence, please. ASSISTANT:", (1,))
TWO_IMAGES = Ask("USER: first <image> and then <image>\nwhich has the cat? ASSISTANT:", (2, 1))
TEXT_ONLY = Ask("USER: Count the birds over the field and name the season. ASSISTANT:")
LONG_TEXT = Ask(
    "USER: " + "First count what lies above, below and around each object. " * 12 + "ASSISTANT:"
)
MIXED = (ONE_IMAGE, TEXT_ONLY, TWO_IMAGES, LONG_TEXT, OTHER_IMAGE)


@dataclass
class Answer:
    """What the engine said. selected: per decision layer, indices into the visual tokens."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[dict[int, float]]
    selected: list[list[int]]
