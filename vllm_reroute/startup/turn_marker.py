"""The token ids with which a prompt asks the assistant to speak: where turns end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.renderers.chat_utils import ConversationMessage

_WORDS = ("Where", "Is it red?")
"""What users say in the conversations rendered here; a marker does not depend on it."""


def turn_marker(model_config: ModelConfig, text: str | None) -> tuple[int, ...]:
    """The marker's token ids, from its text or, where that is None, from the model's chat template.

    Raises ValueError, naming the cure, where neither gives one.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer: Any = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        raise ValueError(
            "--reroute-history keep or recall looks for the ends of turns among a prompt's tokens, but "
            "--skip-tokenizer-init leaves no tokenizer to find them with. Leave that out, or take "
            "--reroute-history rerank."
        )
    if text is not None:
        marker = _of_text(tokenizer, text)
        why = f"--reroute-turn-marker {text!r} has no token of its own behind other text"
    else:
        marker = _of_template(model_config, tokenizer)
        why = f"the chat template of {model_config.model} does not show how"
    if not marker:
        raise ValueError(
            "--reroute-history keep or recall needs to know how a prompt asks the assistant to speak, and "
            f"{why}. Give that text with --reroute-turn-marker, such as 'ASSISTANT:', or take "
            "--reroute-history rerank."
        )
    return tuple(marker)


def _of_text(tokenizer: Any, text: str) -> list[int]:
    """As the text is tokenized behind other text, and behind a space unless it brings its own."""
    before = _encoded(tokenizer, _WORDS[0])
    joined = _WORDS[0] + (text if text[0].isspace() else f" {text}")
    return _without_space(tokenizer, _behind(before, _encoded(tokenizer, joined)))


def _of_template(model_config: ModelConfig, tokenizer: Any) -> list[int]:
    """What the template adds to ask for an answer, as far as it is still there in later turns."""
    found = set()
    for words in _WORDS:
        said = _said("user", words)
        asked = _rendered(model_config, tokenizer, [said], ask=True)
        marker = _behind(_rendered(model_config, tokenizer, [said], ask=False), asked)
        later = _rendered(
            model_config, tokenizer, [said, _said("assistant", "Yes."), said], ask=True
        )
        # Some templates ask with more than they keep before an answer, such as the start of a thought.
        while marker and _count(later, marker) != 2:
            marker = marker[:-1]
        found.add(tuple(_without_space(tokenizer, marker)))
    return list(found.pop()) if len(found) == 1 else []


def _said(role: str, words: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": words}]}


def _rendered(
    model_config: ModelConfig, tokenizer: Any, conversation: list[dict[str, Any]], *, ask: bool
) -> list[int]:
    """Token ids of a conversation; none where the template cannot show it."""
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.hf import safe_apply_chat_template

    try:
        text = safe_apply_chat_template(
            model_config,
            tokenizer,
            cast("list[ConversationMessage]", conversation),
            tokenize=False,
            add_generation_prompt=ask,
        )
    except (ValueError, VLLMValidationError):
        return []
    return _encoded(tokenizer, text) if conversation[0]["content"][0]["text"] in text else []


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _behind(before: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """The tokens behind those that both begin with."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(before, tokens, strict=False))
    return list(tokens[len(list(alike)) :])


def _without_space(tokenizer: Any, marker: list[int]) -> list[int]:
    blank = takewhile(lambda token: not tokenizer.decode([token]).strip(), marker)
    return marker[len(list(blank)) :]


def _count(tokens: Sequence[int], part: Sequence[int]) -> int:
    places = range(len(tokens) - len(part) + 1)
    return sum(list(tokens[i : i + len(part)]) == list(part) for i in places)
