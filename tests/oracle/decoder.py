"""The decoder layers of one request, taken apart so that every layer's K/V is a plain tensor."""

import sys

import torch
from torch import Tensor, nn

BACKBONES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
)


class LayerKV:
    """The K/V entries one layer holds: keys (after rope) and values, [kv_heads, entries, dim]."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[1]

    def append(self, keys: Tensor, values: Tensor) -> None:
        held = len(self) > 0
        self.keys = torch.cat([self.keys, keys], dim=1) if held else keys
        self.values = torch.cat([self.values, values], dim=1) if held else values


class Decoder:
    """Runs single layers of a transformers text model on any subset of a request's tokens.

    Hidden states are [tokens, hidden] in ascending order of position, without a batch dimension;
    positions are [tokens], or [3, tokens] for M-RoPE, and may have gaps.
    """

    def __init__(self, text_model: nn.Module) -> None:
        config = text_model.config
        if config.model_type not in BACKBONES:
            raise ValueError(
                f"text backbone {config.model_type!r} is not covered by the oracle. "
                f"Choose one of: {', '.join(BACKBONES)}."
            )
        _refuse_sliding_window(text_model)
        # Rope and head repetition as this model family defines them.
        family = sys.modules[type(text_model).__module__]
        self._apply_rope = family.apply_rotary_pos_emb
        self._repeat_kv = family.repeat_kv
        self._rotary = text_model.rotary_emb
        self.layers = text_model.layers

    def project(
        self, layer: int, hidden: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a layer's input: norm, projection, q/k norm if any, rope.

        Returns q [heads, tokens, dim] and k, v [kv_heads, tokens, dim].
        """
        block = self.layers[layer]
        attention = block.self_attn
        normed = block.input_layernorm(hidden)
        by_head = (1, hidden.shape[0], -1, attention.head_dim)
        query = attention.q_proj(normed).view(by_head)
        key = attention.k_proj(normed).view(by_head)
        value = attention.v_proj(normed).view(by_head)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        cos, sin = self._rotary(hidden, positions[..., None, :])
        query, key = self._apply_rope(query, key, cos, sin)
        return query[0], key[0], value[0]

    def repeat_heads(self, layer: int, states: Tensor) -> Tensor:
        """[kv_heads, tokens, dim] to [heads, tokens, dim] for grouped-query attention."""
        groups = self.layers[layer].self_attn.num_key_value_groups
        return self._repeat_kv(states[None], groups)[0]

    def run_layer(self, layer: int, hidden: Tensor, positions: Tensor, kv: LayerKV) -> Tensor:
        """One decoder layer; the tokens given are appended to `kv` and attend to all of it.

        The causal mask goes by order in `kv`. Returns [tokens, hidden].
        """
        block = self.layers[layer]
        query, key, value = self.project(layer, hidden, positions)
        kv.append(key, value)
        keys = self.repeat_heads(layer, kv.keys).float()
        values = self.repeat_heads(layer, kv.values).float()

        num_new, num_held = query.shape[1], len(kv)
        visible = torch.ones(num_new, num_held, dtype=torch.bool).tril(num_held - num_new)
        logits = query.float() @ keys.transpose(1, 2) * query.shape[-1] ** -0.5
        weights = logits.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        mixed = (weights @ values).to(hidden.dtype).transpose(0, 1).flatten(start_dim=1)

        hidden = hidden + block.self_attn.o_proj(mixed)
        return hidden + block.mlp(block.post_attention_layernorm(hidden))


def _refuse_sliding_window(text_model: nn.Module) -> None:
    windows = [getattr(block.self_attn, "sliding_window", None) for block in text_model.layers]
    if text_model.config.model_type == "mistral":  # one window for the model, kept in its config
        windows.append(text_model.config.sliding_window)
    active = {window for window in windows if window is not None}
    if active:
        raise ValueError(
            f"sliding_window {sorted(active)} is active; the oracle knows full attention only. "
            "Set sliding_window to null (and use_sliding_window to false) in the text config."
        )
