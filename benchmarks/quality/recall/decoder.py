"""A Llama decoder taken apart: single layers on any rows of a conversation, keys and values as plain tensors."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

# Cosine and sine of rows' positions, each [rows, head size].
Rotation = tuple[Tensor, Tensor]


class LayerKV:
    """Keys (rotated) and values that one layer holds, [heads, entries, head size], in the order they were run.

    Tensors are replaced, never written: a shallow copy goes on by itself.
    """

    def __init__(self, heads: int, head_size: int) -> None:
        self.keys = self.values = torch.empty(heads, 0, head_size)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys = torch.cat([self.keys, keys], dim=1)
        self.values = torch.cat([self.values, values], dim=1)


@dataclass(frozen=True)
class _Layer:
    norm: Tensor
    qkv: Tensor
    out: Tensor
    norm_after: Tensor
    gate_up: Tensor
    down: Tensor


class Decoder:
    """Runs layers on rows: hidden [rows, width], at the rotation of their positions, which may have gaps."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        text = model.model.language_model
        config = text.config
        if config.num_key_value_heads != config.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads {config.num_key_value_heads} must equal num_attention_heads "
                f"{config.num_attention_heads}: the experiment's decoder has no grouped queries."
            )
        self.heads, self.head_size = config.num_attention_heads, config.head_dim
        self.eps = config.rms_norm_eps
        self.layers = [_weights(layer) for layer in text.layers]
        self.final_norm, self.words = text.norm.weight, model.lm_head.weight
        angles = torch.arange(config.max_position_embeddings)[:, None] * text.rotary_emb.inv_freq
        self._cos, self._sin = (
            f(torch.cat([angles, angles], dim=-1)) for f in (torch.cos, torch.sin)
        )

    def empty(self) -> list[LayerKV]:
        return [LayerKV(self.heads, self.head_size) for _ in self.layers]

    def rotation(self, positions: Tensor) -> Rotation:
        return self._cos[positions], self._sin[positions]

    def project(self, layer: int, hidden: Tensor, at: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value at a layer's input, each [heads, rows, head size]. at: the rows' rotation."""
        weights = self.layers[layer]
        fused = F.linear(F.rms_norm(hidden, hidden.shape[-1:], weights.norm, self.eps), weights.qkv)
        query, key, value = fused.view(-1, 3, self.heads, self.head_size).permute(1, 2, 0, 3)
        return _turned(query, *at), _turned(key, *at), value

    def run(self, layer: int, hidden: Tensor, at: Rotation, kv: LayerKV, sees: Tensor) -> Tensor:
        """One layer; the rows are appended to `kv`. sees: bool [rows, entries], true where a row looks."""
        weights = self.layers[layer]
        query, key, value = self.project(layer, hidden, at)
        kv.append(key, value)
        mixed = F.scaled_dot_product_attention(query[None], kv.keys[None], kv.values[None], sees)[0]
        hidden = hidden + F.linear(mixed.transpose(0, 1).flatten(1), weights.out)
        normed = F.rms_norm(hidden, hidden.shape[-1:], weights.norm_after, self.eps)
        gate, up = F.linear(normed, weights.gate_up).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate) * up, weights.down)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden as it leaves the last layer. Returns [rows, vocabulary]."""
        return F.linear(
            F.rms_norm(hidden, hidden.shape[-1:], self.final_norm, self.eps), self.words
        )


def _weights(layer: nn.Module) -> _Layer:
    named = dict(layer.named_parameters())

    def stacked(*names: str) -> Tensor:
        return torch.cat([named[f"{name}_proj.weight"] for name in names])

    return _Layer(
        norm=named["input_layernorm.weight"],
        qkv=stacked("self_attn.q", "self_attn.k", "self_attn.v"),
        out=stacked("self_attn.o"),
        norm_after=named["post_attention_layernorm.weight"],
        gate_up=stacked("mlp.gate", "mlp.up"),
        down=stacked("mlp.down"),
    )


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
