"""One decoder layer and one vision layer as functions, compiled once and run for every layer.

They compute what transformers' layers compute (a test compares them), in bf16 where it is safe: norms, softmax and the
residual stream stay fp32. At this width most of a step is memory traffic, which fusing saves.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


def decoder_weights(layer: Any) -> tuple[Tensor, ...]:
    """A Llama layer's parameters in the order `decoder_layer` takes them."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        layer.input_layernorm.weight,
        attention.q_proj.weight,
        attention.k_proj.weight,
        attention.v_proj.weight,
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        mlp.gate_proj.weight,
        mlp.up_proj.weight,
        mlp.down_proj.weight,
    )


def vision_weights(layer: Any) -> tuple[Tensor, ...]:
    """A CLIP layer's parameters in the order `vision_layer` takes them."""
    attention, mlp = layer.self_attn, layer.mlp
    modules = (
        layer.layer_norm1,
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.out_proj,
        layer.layer_norm2,
        mlp.fc1,
        mlp.fc2,
    )
    return tuple(weight for module in modules for weight in (module.weight, module.bias))


def decoder_layer(
    stream: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    heads: int,
    dtype: torch.dtype,
    *weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """A prompt start attends to itself, each line behind it to the start and to itself.

    stream: fp32 [pictures, start + lines · length, width]. cos, sin: [pictures, 1, tokens, head size]. mask: bool
    [pictures · lines, 1, length, start + length], true where a token looks. Returns the stream, and the rotated
    queries and keys of the first head, [pictures, tokens, head size].
    """
    norm1, wq, wk, wv, wo, norm2, gate, up, down = weights
    pictures, tokens, _ = stream.shape
    length = mask.shape[2]
    start = mask.shape[3] - length
    lines = (tokens - start) // length
    normed = (F.rms_norm(stream, stream.shape[-1:], None, EPS) * norm1).to(dtype)
    fused = F.linear(normed, torch.cat([wq, wk, wv]).to(dtype))
    query, key, value = fused.view(pictures, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    query, key = (_turned(x, cos, sin).to(dtype) for x in (query, key))

    def on_lines(x: Tensor) -> Tensor:
        return x[:, :, start:].unflatten(2, (lines, length)).transpose(1, 2).flatten(0, 1)

    def with_start(x: Tensor) -> Tensor:
        shared = x[:, None, :, :start].expand(-1, lines, -1, -1, -1).flatten(0, 1)
        return torch.cat([shared, on_lines(x)], dim=2)

    causal = torch.ones(start, start, dtype=torch.bool).tril()
    first = _attend(query[:, :, :start], key[:, :, :start], value[:, :, :start], causal)
    rest = _attend(on_lines(query), with_start(key), with_start(value), mask)
    rest = rest.view(pictures, lines, heads, length, -1).transpose(1, 2).flatten(2, 3)
    attended = torch.cat([first, rest], dim=2).transpose(1, 2).reshape(pictures, tokens, -1)
    stream = stream + F.linear(attended, wo.to(dtype))
    normed = (F.rms_norm(stream, stream.shape[-1:], None, EPS) * norm2).to(dtype)
    opened = F.silu(F.linear(normed, gate.to(dtype))) * F.linear(normed, up.to(dtype))
    return stream + F.linear(opened, down.to(dtype)), query[:, 0], key[:, 0]


def vision_layer(stream: Tensor, heads: int, dtype: torch.dtype, *weights: Tensor) -> Tensor:
    """A CLIP layer: every patch attends to every patch. stream: fp32 [pictures, patches, width]."""
    norm1, norm1_b, wq, bq, wk, bk, wv, bv, wo, bo, norm2, norm2_b, w1, b1, w2, b2 = weights
    pictures, patches, width = stream.shape
    normed = F.layer_norm(stream, (width,), norm1, norm1_b, EPS).to(dtype)
    fused = F.linear(normed, torch.cat([wq, wk, wv]).to(dtype), torch.cat([bq, bk, bv]).to(dtype))
    query, key, value = fused.view(pictures, patches, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    attended = _attend(query, key, value, None).transpose(1, 2).reshape(pictures, patches, width)
    stream = stream + F.linear(attended, wo.to(dtype), bo.to(dtype))
    normed = F.layer_norm(stream, (width,), norm2, norm2_b, EPS).to(dtype)
    opened = F.linear(normed, w1.to(dtype), b1.to(dtype)).float()
    opened = (opened * torch.sigmoid(1.702 * opened)).to(dtype)  # CLIP's quick GELU
    return stream + F.linear(opened, w2.to(dtype), b2.to(dtype))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, fp32."""
    x = x.float()
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Plain attention; the softmax fp32. At these lengths fused products beat the flash kernel of the CPU."""
    logits = (query @ key.mT).float() * query.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -1e30)
    return logits.softmax(dim=-1).to(value.dtype) @ value


compiled_decoder_layer = torch.compile(decoder_layer, dynamic=False)
compiled_vision_layer = torch.compile(vision_layer, dynamic=False)
