"""LLaVA-NeXT (1.6) with Mistral: an overview of the image, then its tiles without padding, a newline after each row."""

from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerBase,
)

from benchmarks.local_models.family import Family, FamilyShape, special_id
from benchmarks.local_tokenizer import llava_tokenizer

PATCH = 14
TILE = 4 * PATCH
# The published resolutions in tiles, (height, width).
PINPOINTS = [[TILE * h, TILE * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]

# All images of a message first, then its text. The tokenizer puts <s> in front.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- ' ' }}{%- else %}{{- '[INST] ' }}{%- endif %}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
{%- for part in message.content if part.type == 'image' %}{{- '<image>\\n' }}{%- endfor %}
{%- for part in message.content if part.type == 'text' %}{{- part.text }}{%- endfor %}
{%- endif %}
{%- if message.role == 'assistant' %}{{- '</s>' }}{%- else %}{{- ' [/INST]' }}{%- endif %}
{%- endfor %}
"""

PUBLISHED_PREFIXES = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}


def make_config(shape: FamilyShape, tokenizer: PreTrainedTokenizerBase) -> LlavaNextConfig:
    return LlavaNextConfig(
        architectures=["LlavaNextForConditionalGeneration"],
        text_config={
            "model_type": "mistral",
            "sliding_window": None,
            **shape.text_options(),
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "rms_norm_eps": 1e-5,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": shape.vision_hidden_size,
            "intermediate_size": 4 * shape.vision_hidden_size,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_heads,
            "image_size": TILE,
            "patch_size": PATCH,
            "projection_dim": shape.vision_hidden_size,
        },
        image_token_index=special_id(tokenizer, "<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(TILE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        dtype=shape.dtype,
    )


def make_processor(shape: FamilyShape) -> LlavaNextProcessor:
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=PINPOINTS,
        ),
        tokenizer=llava_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


FAMILY = Family(
    model_class=LlavaNextForConditionalGeneration,
    make_config=make_config,
    make_processor=make_processor,
    projections=("model.multi_modal_projector.linear_2",),
    published_prefixes=PUBLISHED_PREFIXES,
)
