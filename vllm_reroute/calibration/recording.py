"""One row of attention per decoder layer, from a dense pass of plain transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForImageTextToText
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_NAME = "reroute_recording"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the last prompt token looks at, all fp32 [layers, visual tokens].

    attention: its attention, the mean over heads, as decisions score it.
    contribution: length of what each visual token adds to its residual stream through attention
    (weight times value, through the output projection), over the length of that stream.
    change: length of what the layer adds to the visual token's own stream, over that stream's length
    behind it.
    """

    attention: np.ndarray
    contribution: np.ndarray
    change: np.ndarray


@dataclass
class _Pass:
    """What the attention function of a pass in progress adds to. visual: bool [tokens]."""

    visual: torch.Tensor
    attention: dict[int, torch.Tensor]
    contribution: dict[int, torch.Tensor]
    change: dict[int, torch.Tensor]


_current: _Pass | None = None


def last_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last token to each token, and the values it weighs.

    query: [heads, tokens, dim]; key, value: [kv_heads, tokens, dim], after rope.
    Returns weights fp32 [heads, tokens] and values [heads, tokens, dim].
    """
    num_kv_heads, _, dim = key.shape
    grouped = query[:, -1].view(num_kv_heads, -1, dim).float()
    logits = torch.bmm(grouped, key.transpose(1, 2).float()) * scaling
    weights = logits.softmax(dim=-1)
    values = value[:, None].expand(-1, grouped.shape[1], -1, -1)
    return weights.flatten(0, 1), values.flatten(0, 1)


def _recording_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' own SDPA, and one row beside it.

    module: a decoder's attention, of any family. query, key, value: [1, heads, tokens, dim].
    """
    if attention_mask is not None and not bool(attention_mask[0, 0, -1].all()):
        raise ValueError(
            "the model hides tokens from the last prompt token (a sliding window?), which routing "
            "does not support. Calibrate a model whose decoder layers see the whole prompt."
        )
    assert _current is not None, "only a Recorder runs this attention"
    visual = _current.visual
    weights, values = last_row(query[0], key[0], value[0], scaling)
    weights, values = weights[:, visual], values[:, visual]
    _current.attention[module.layer_idx] = weights.mean(dim=0)
    added = (weights[..., None].to(values.dtype) * values).transpose(0, 1).flatten(1)
    _current.contribution[module.layer_idx] = module.o_proj(added).float().norm(dim=-1)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


class Recorder:
    """A model that answers nothing and remembers where its last prompt token looks.

    Holds the model and, at any time, one layer's row: never a map over queries, no K/V cache, no logits.
    """

    def __init__(self, folder: str, dtype: str, device: str) -> None:
        AttentionInterface.register(ATTENTION_NAME, _recording_attention)
        AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
        self.device = device
        model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            device_map=None,
            attn_implementation={"text_config": ATTENTION_NAME, "vision_config": "sdpa"},
        )
        self.model = model.eval().to(device)
        config = self.model.config
        tokens = [config.image_token_id, getattr(config, "video_token_id", None)]
        self._visual_ids = torch.tensor([t for t in tokens if t is not None], device=device)
        self.num_layers = config.get_text_config().num_hidden_layers

    @torch.inference_mode()
    def record(self, inputs: Mapping[str, torch.Tensor]) -> Rows:
        """inputs: of one prompt, as the model's processor prepares it, ending in text."""
        global _current
        inputs = {name: self._placed(tensor) for name, tensor in inputs.items()}
        ids = inputs["input_ids"][0]
        _current = _Pass(torch.isin(ids, self._visual_ids), {}, {}, {})
        decoder = self.model.model.language_model
        hooks = [
            layer.register_forward_hook(_note_streams(_current, index), with_kwargs=True)
            for index, layer in enumerate(decoder.layers)
        ]
        try:
            self.model.model(**inputs, use_cache=False)
            layers, seen = range(self.num_layers), _current
            return Rows(
                attention=_numpy([seen.attention[i] for i in layers]),
                contribution=_numpy([seen.contribution[i] for i in layers]),
                change=_numpy([seen.change[i] for i in layers]),
            )
        finally:
            _current = None
            for hook in hooks:
                hook.remove()

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.to(self.device, self.model.dtype)
        return tensor.to(self.device)


def _note_streams(seen: _Pass, layer: int) -> Any:
    """A hook that measures streams before and behind a layer."""

    def note(_: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        before = (args[0] if args else kwargs["hidden_states"])[0]
        behind = (output[0] if isinstance(output, tuple) else output)[0]
        visual = seen.visual
        seen.contribution[layer] /= before[-1].float().norm()
        change = (behind[visual] - before[visual]).float().norm(dim=-1)
        seen.change[layer] = change / behind[visual].float().norm(dim=-1)

    return note


def _numpy(rows: list[torch.Tensor]) -> np.ndarray:
    return torch.stack(rows).float().cpu().numpy()
