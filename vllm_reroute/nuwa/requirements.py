"""What Nüwa needs of a model and of its vision encoder's options: refused at start otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_reroute.families.table import FAMILIES, family_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import VllmConfig

_CURE = "Choose another --reroute-schedule, or serve without one."


def check_model(hf_config: PretrainedConfig) -> None:
    """Raises ValueError for a model whose vision tower has no anchors to offer."""
    architecture = (getattr(hf_config, "architectures", None) or [""])[0]
    family = family_of(architecture)
    if family is None or family.nuwa_class is None:
        able = ", ".join(family.title for family in FAMILIES if family.nuwa_class)
        name = family.title if family else repr(architecture)
        raise ValueError(
            f"--reroute-schedule nuwa cannot route {name}: its first decision is read from the "
            f"vision tower, which differs from family to family. Allowed with: {able}. {_CURE}"
        )
    if family.fixed_grid:
        _check_clip(hf_config)
    else:
        _check_last_block(hf_config)


def check_encoder_options(vllm_config: VllmConfig) -> None:
    """Raises ValueError for options under which the encoder's inside cannot be read."""
    multimodal = vllm_config.model_config.multimodal_config
    assert multimodal is not None, "every supported family sees"
    compilation = vllm_config.compilation_config
    wrong = (
        (
            "--enable-mm-embeds",
            multimodal.enable_mm_embeds,
            "embeddings made elsewhere carry no decision of the vision encoder",
        ),
        (
            "--mm-encoder-tp-mode data",
            multimodal.mm_encoder_tp_mode == "data",
            "one rank alone would see an image's attention",
        ),
        (
            "--compilation-config with compile_mm_encoder",
            compilation.compile_mm_encoder,
            "hidden states are read between the blocks of the vision encoder",
        ),
        (
            "--compilation-config with cudagraph_mm_encoder",
            compilation.cudagraph_mm_encoder,
            "hidden states are read between the blocks of the vision encoder",
        ),
    )
    for option, given, why in wrong:
        if given:
            raise ValueError(
                f"{option} cannot be combined with --reroute-schedule nuwa: {why}. Allowed: unset. "
                f"Leave it out, or choose another --reroute-schedule."
            )


def _check_clip(hf_config: PretrainedConfig) -> None:
    tower = hf_config.vision_config.model_type
    if tower != "clip_vision_model":
        raise ValueError(
            f"--reroute-schedule nuwa cannot read the vision tower {tower!r}: salience is the "
            f"attention of a class token, which it has not. Allowed: 'clip_vision_model'. {_CURE}"
        )
    layer = hf_config.vision_feature_layer
    if not isinstance(layer, int) or layer == 0:
        raise ValueError(
            f"--reroute-schedule nuwa cannot read vision_feature_layer {layer!r}: salience is the "
            f"attention of one layer. Allowed: a single layer other than 0, such as -2. {_CURE}"
        )
    strategy = hf_config.vision_feature_select_strategy
    if strategy != "default":
        raise ValueError(
            f"--reroute-schedule nuwa cannot use vision_feature_select_strategy {strategy!r}: the "
            f"class token would be no cell of the grid. Allowed: 'default'. {_CURE}"
        )


def _check_last_block(hf_config: PretrainedConfig) -> None:
    vision = hf_config.vision_config
    if vision.depth - 1 not in vision.fullatt_block_indexes:
        raise ValueError(
            f"--reroute-schedule nuwa cannot use fullatt_block_indexes "
            f"{list(vision.fullatt_block_indexes)} of {vision.depth} vision blocks: salience is the "
            "attention over the whole image in the last block. Allowed: indexes with "
            f"{vision.depth - 1}. {_CURE}"
        )
