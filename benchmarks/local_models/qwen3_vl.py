"""Qwen3-VL, dense: DeepStack features, interleaved M-RoPE, q/k norms, timestamps between a video's frames."""

from transformers import (
    PreTrainedTokenizerBase,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from benchmarks.local_models.family import Family, FamilyShape
from benchmarks.local_models.qwen_text import (
    QWEN3_CHAT_TEMPLATE,
    chat_ids,
    qwen_tokenizer,
    token_ids,
)

PATCH = 16
PIXELS_PER_TOKEN = (2 * PATCH) ** 2
IMAGE_SIZE = {"shortest_edge": 16 * PIXELS_PER_TOKEN, "longest_edge": 96 * PIXELS_PER_TOKEN}
# Of all frames together; two frames become one grid of tokens.
VIDEO_SIZE = {"shortest_edge": 16 * PIXELS_PER_TOKEN, "longest_edge": 160 * PIXELS_PER_TOKEN}
# Vision layers whose output is added to the visual tokens after decoder layers 0 and 1.
DEEPSTACK_LAYERS = [0, 2]
GRID_SIDE = 16
# The configuration names the head size, and heads together may be wider than the hidden state, as in the 4B.
HEADS_WIDER = 2


def make_config(shape: FamilyShape, tokenizer: PreTrainedTokenizerBase) -> Qwen3VLConfig:
    head_size = HEADS_WIDER * shape.head_size
    return Qwen3VLConfig(
        architectures=["Qwen3VLForConditionalGeneration"],
        text_config={
            **shape.text_options(),
            **chat_ids(tokenizer),
            "head_dim": head_size,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": interleaved_sections(head_size),
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_hidden_size,
            "out_hidden_size": shape.hidden_size,
            "intermediate_size": 2 * shape.vision_hidden_size,
            "num_heads": shape.vision_heads,
            "patch_size": PATCH,
            "num_position_embeddings": GRID_SIDE**2,
            "deepstack_visual_indexes": DEEPSTACK_LAYERS,
        },
        dtype=shape.dtype,
        **token_ids(tokenizer),
    )


def interleaved_sections(head_size: int) -> list[int]:
    """Frequencies of time, height and width, dealt out in turn; time gets what is left, as in 24, 20, 20.

    Height and width take every third frequency, so neither may have more than a third of half a head.
    """
    side = head_size // 6
    return [head_size // 2 - 2 * side, side, side]


def make_processor(shape: FamilyShape) -> Qwen3VLProcessor:
    half = [0.5, 0.5, 0.5]
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            size=IMAGE_SIZE, patch_size=PATCH, image_mean=half, image_std=half
        ),
        tokenizer=qwen_tokenizer(),
        video_processor=Qwen3VLVideoProcessor(
            size=VIDEO_SIZE, patch_size=PATCH, cap_pixels_per_frame=False
        ),
        chat_template=QWEN3_CHAT_TEMPLATE,
    )


FAMILY = Family(
    model_class=Qwen3VLForConditionalGeneration,
    make_config=make_config,
    make_processor=make_processor,
    projections=(
        "model.visual.merger.linear_fc2",
        *(
            f"model.visual.deepstack_merger_list.{level}.linear_fc2"
            for level in range(len(DEEPSTACK_LAYERS))
        ),
    ),
    published_prefixes={"model.": "model.", "lm_head.": "lm_head."},
)
