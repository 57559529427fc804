"""Requests the engine tests send, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from benchmarks.grounding.evaluate import prompt
from benchmarks.grounding.questions import KINDS, Question, questions
from benchmarks.photos import PHOTOS

MAX_TOKENS = 16


@dataclass(frozen=True)
class Ask:
    """One request. images: indices into the test photographs. text: with one <image> per image.

    explain: whether it asks what was decided.
    """

    text: str
    images: tuple[int, ...] = ()
    max_tokens: int = MAX_TOKENS
    options: dict[str, Any] = field(default_factory=dict)
    explain: bool = True

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
        return greedy(self.max_tokens, self.options, self.explain)

    @property
    def key(self) -> Any:
        """What tells it apart from other requests to the same model."""
        return (self.text, self.images, self.max_tokens)

    @property
    def visual(self) -> bool:
        """Whether anything of it is routed."""
        return bool(self.images)


@dataclass(frozen=True)
class SceneAsk(Ask):
    """A request about rendered scenes. images: which questions of the test split they belong to."""

    # Most answers with their end; what follows that is noise. Those that count may be longer.
    max_tokens: int = 4

    def pictures(self) -> list[Any]:
        return [scene_questions()[i].image for i in self.images]

    @classmethod
    def about(cls, number: int) -> SceneAsk:
        """The question of that number, as the grounding model was trained to be asked it."""
        return cls(prompt(scene_questions()[number].text), (number,))


@cache
def scene_questions() -> list[Question]:
    """Two of every kind."""
    return list(questions("test", 2 * len(KINDS)))


def greedy(max_tokens: int, options: Mapping[str, Any], explain: bool = False) -> Any:
    """Sampling parameters that make answers comparable, changed by `options`.

    explain: whether to ask what was decided, scores and all.
    """
    from vllm import SamplingParams

    given = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 5}
    given |= options
    if explain:
        given["extra_args"] = {**given.get("extra_args", {}), "reroute_explain": "scores"}
    return SamplingParams(**given)


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

# What the grounding model is for: one and two hops, and what it never saw: no and several images.
SCENES = (
    SceneAsk.about(0),
    SceneAsk("USER: Where is the red circle? ASSISTANT:"),
    SceneAsk("USER: first <image> and then <image>\nwhich has more stars? ASSISTANT:", (2, 5)),
    SceneAsk.about(7),
    SceneAsk.about(13),
)


@dataclass
class Answer:
    """What the engine said. selected: per decision layer, indices into the visual tokens.

    num_cached: prompt tokens read from the prefix cache. num_created: those it holds since then.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[dict[int, float]]
    selected: list[list[int]]
    num_cached: int = 0
    num_created: int = 0
