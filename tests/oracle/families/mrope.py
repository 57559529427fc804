"""M-RoPE positions of a Qwen-VL prompt, from transformers' own `get_rope_index`."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


def rope_index(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Positions [3, tokens] (time, height, width), and the position of the first generated token.

    inputs: input_ids [1, tokens], and of the grids those that the request has.
    """
    input_ids = inputs["input_ids"]
    config = model.config
    kinds = 1 * (input_ids == config.image_token_id) + 2 * (input_ids == config.video_token_id)
    grids = {name: inputs[name] for name in GRIDS if name in inputs}
    positions, deltas = model.model.get_rope_index(input_ids, mm_token_type_ids=kinds, **grids)
    positions = positions[:, 0]
    _refuse_late_frames(positions, visual=kinds[0] > 0)
    return positions, input_ids.shape[1] + int(deltas)


def _refuse_late_frames(positions: Tensor, visual: Tensor) -> None:
    """Text after a video starts one past all of the video's positions, as in the published model and in vLLM.

    transformers 5 starts it one past height and width alone, before the last frames' times.
    """
    highest_so_far = positions.max(dim=0).values.cummax(dim=0).values
    starts_text = (visual[:-1] & ~visual[1:]).nonzero().flatten() + 1
    if not torch.equal(positions[0, starts_text], highest_so_far[starts_text - 1] + 1):
        raise ValueError(
            "a video's last frame is later than its height and width reach, where transformers and vLLM count "
            "the text after it differently. Give fewer or larger frames."
        )
