"""Qwen's tokenizer with a small vocabulary, ChatML templates, and the positions' sections."""

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from benchmarks.local_tokenizer import TEXT

# At most: the paragraph has no more to merge.
TRAINED_VOCABULARY_SIZE = 1016
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION_TOKENS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

_PARTS = """\
{%- for part in message.content %}
{%- if part.type in ('image', 'image_url') or 'image' in part %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' or 'video' in part %}
{{- '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif 'text' in part %}
{{- part.text }}
{%- endif %}
{%- endfor %}
"""
_MESSAGES = (
    """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
"""
    + _PARTS
    + """\
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
)
# Qwen2-VL and Qwen2.5-VL put a system message in front of a conversation that has none; Qwen3-VL does not.
QWEN3_CHAT_TEMPLATE = _MESSAGES
QWEN2_CHAT_TEMPLATE = (
    "{%- if messages and messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}\n" + _MESSAGES
)


def qwen_tokenizer(vision_tokens: tuple[str, ...] = VISION_TOKENS) -> Qwen2Tokenizer:
    """Special tokens have the last ids of the vocabulary, as in the published one."""
    special = (*CHAT_TOKENS, *vision_tokens)
    vocabulary, merges = _trained()
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]  # pairs, as tokenizers reads them
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(special),
        clean_up_tokenization_spaces=False,
    )


@cache
def _trained() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE over Qwen's own pieces of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TRAINED_VOCABULARY_SIZE,
        min_frequency=1,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT.replace("\n", " ")], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    return trained["vocab"], [tuple(pair) for pair in trained["merges"]]


def token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a Qwen-VL configuration calls the vision tokens."""
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def chat_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a Qwen text configuration calls the tokens around a conversation."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def rope_sections(head_size: int) -> list[int]:
    """Frequencies of time, height and width in the published proportion 2 : 3 : 3; half a head in all."""
    side = 3 * (head_size // 2) // 8
    return [head_size // 2 - 2 * side, side, side]
