"""LLaVA-OneVision with SigLIP and Qwen2: images as in LLaVA-NeXT, at most nine tiles' worth; frames pooled by two."""

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerBase,
)

from benchmarks.local_models import llava_next
from benchmarks.local_models.family import Family, FamilyShape, special_id
from benchmarks.local_models.qwen_text import chat_ids, qwen_tokenizer

PATCH = 14
# Three patches a side: odd, as the published 27, so that pooling by two rounds up.
TILE = 3 * PATCH
PINPOINTS = [[TILE * h, TILE * w] for h in range(1, 7) for w in range(1, 7)]

# All images of a message first, then its videos, then its text.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + ' ' }}
{%- if message.content is string %}
{{- '\\n' + message.content }}
{%- else %}
{%- for part in message.content if part.type == 'image' %}{{- '<image>' }}{%- endfor %}
{%- for part in message.content if part.type == 'video' %}{{- '<video>' }}{%- endfor %}
{%- for part in message.content if part.type == 'text' %}{{- '\\n' + part.text }}{%- endfor %}
{%- endif %}
{{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def make_config(shape: FamilyShape, tokenizer: PreTrainedTokenizerBase) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        architectures=["LlavaOnevisionForConditionalGeneration"],
        text_config={
            "model_type": "qwen2",
            **shape.text_options(),
            **chat_ids(tokenizer),
            "use_sliding_window": False,
            "rms_norm_eps": 1e-6,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": shape.vision_hidden_size,
            "intermediate_size": 2 * shape.vision_hidden_size,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_heads,
            "image_size": TILE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        image_token_index=special_id(tokenizer, "<image>"),
        video_token_index=special_id(tokenizer, "<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        dtype=shape.dtype,
    )


def make_processor(shape: FamilyShape) -> LlavaOnevisionProcessor:
    size = {"height": TILE, "width": TILE}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer=qwen_tokenizer(("<image>", "<video>")),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(TILE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=CHAT_TEMPLATE,
    )


FAMILY = Family(
    model_class=LlavaOnevisionForConditionalGeneration,
    make_config=make_config,
    make_processor=make_processor,
    projections=("model.multi_modal_projector.linear_2",),
    published_prefixes=llava_next.PUBLISHED_PREFIXES,
)
