"""Qwen2.5-VL: window attention in the vision tower, and times of a video's frames in its positions."""

from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from benchmarks.local_models import qwen2_vl
from benchmarks.local_models.family import Family, FamilyShape
from benchmarks.local_models.qwen_text import QWEN2_CHAT_TEMPLATE, qwen_tokenizer, token_ids

# Windows of 4 x 4 tokens, as published; a photograph has several.
WINDOW = 8 * qwen2_vl.PATCH
FULL_ATTENTION_LAYERS = [1, 3]


def make_config(shape: FamilyShape, tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config=qwen2_vl.make_text_options(shape, tokenizer),
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_hidden_size,
            "out_hidden_size": shape.hidden_size,
            "intermediate_size": 2 * shape.vision_hidden_size,
            "num_heads": shape.vision_heads,
            "patch_size": qwen2_vl.PATCH,
            "window_size": WINDOW,
            "fullatt_block_indexes": FULL_ATTENTION_LAYERS,
            "tokens_per_second": 2,
        },
        dtype=shape.dtype,
        **token_ids(tokenizer),
    )


def make_processor(shape: FamilyShape) -> Qwen2_5_VLProcessor:
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=qwen2_vl.IMAGE_SIZE),
        tokenizer=qwen_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(size=qwen2_vl.VIDEO_SIZE, cap_pixels_per_frame=False),
        chat_template=QWEN2_CHAT_TEMPLATE,
    )


FAMILY = Family(
    model_class=Qwen2_5_VLForConditionalGeneration,
    make_config=make_config,
    make_processor=make_processor,
    projections=("model.visual.merger.mlp.2",),
    published_prefixes=qwen2_vl.PUBLISHED_PREFIXES,
)
