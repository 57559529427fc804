"""Qwen2-VL: any image size, M-RoPE in three blocks of frequencies."""

from transformers import (
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from benchmarks.local_models.family import Family, FamilyShape
from benchmarks.local_models.qwen_text import (
    QWEN2_CHAT_TEMPLATE,
    chat_ids,
    qwen_tokenizer,
    rope_sections,
    token_ids,
)

PATCH = 14
PIXELS_PER_TOKEN = (2 * PATCH) ** 2
IMAGE_SIZE = {"shortest_edge": 16 * PIXELS_PER_TOKEN, "longest_edge": 96 * PIXELS_PER_TOKEN}
# Of one frame; two frames become one grid of tokens.
VIDEO_SIZE = {"shortest_edge": 4 * PIXELS_PER_TOKEN, "longest_edge": 30 * PIXELS_PER_TOKEN}

PUBLISHED_PREFIXES = {
    "model.visual.": "visual.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}


def make_text_options(shape: FamilyShape, tokenizer: PreTrainedTokenizerBase) -> dict:
    return {
        **shape.text_options(),
        **chat_ids(tokenizer),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": rope_sections(shape.head_size),
        },
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
    }


def make_config(shape: FamilyShape, tokenizer: PreTrainedTokenizerBase) -> Qwen2VLConfig:
    return Qwen2VLConfig(
        architectures=["Qwen2VLForConditionalGeneration"],
        text_config=make_text_options(shape, tokenizer),
        vision_config={
            "depth": shape.vision_layers,
            "embed_dim": shape.vision_hidden_size,
            "hidden_size": shape.hidden_size,
            "num_heads": shape.vision_heads,
            "mlp_ratio": 2,
            "patch_size": PATCH,
        },
        dtype=shape.dtype,
        **token_ids(tokenizer),
    )


def make_processor(shape: FamilyShape) -> Qwen2VLProcessor:
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=IMAGE_SIZE),
        tokenizer=qwen_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(size=VIDEO_SIZE, cap_pixels_per_frame=False),
        chat_template=QWEN2_CHAT_TEMPLATE,
    )


FAMILY = Family(
    model_class=Qwen2VLForConditionalGeneration,
    make_config=make_config,
    make_processor=make_processor,
    projections=("model.visual.merger.mlp.2",),
    published_prefixes=PUBLISHED_PREFIXES,
)
