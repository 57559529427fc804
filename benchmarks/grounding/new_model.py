"""The LLaVA before training: its shape and its first weights."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from benchmarks.grounding.guidance import TARGET_LAYERS
from benchmarks.grounding.scenes import GRID, IMAGE_SIZE
from benchmarks.grounding.vocabulary import (
    CELLS,
    IMAGE_TOKEN,
    PATCH_SIZE,
    token,
    trained_tokenizer,
    word,
)

HEAD_SIZE = 32
# Strength of looking at one's like, and of copying from it, before training.
MATCHING, COPYING = 2.6, 0.1
FIRST_LOGITS = 0.3


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model, by default the guided one's: as deep as LLaVA-1.5-7B, so published decision layers stand.

    own_layers: decoder layers with weights of their own; those after them repeat these in turn. vision_layers: the
    last one is never read, LLaVA takes the output of the layer before it. looks_on_from: from that decoder layer on,
    half of the heads start by looking for a cell that was found before.
    """

    width: int = 128
    text_layers: int = 32
    own_layers: int = 32
    text_feed_forward: int = 256
    vision_layers: int = 5
    vision_feed_forward: int = 512
    patch_size: int = PATCH_SIZE
    looks_on_from: int = TARGET_LAYERS.start
    rope_theta: float = 500_000.0

    @property
    def heads(self) -> int:
        return self.width // HEAD_SIZE

    @property
    def patches(self) -> int:
        """Along a side of the picture."""
        return IMAGE_SIZE // self.patch_size


def make_config(shape: Shape) -> LlavaConfig:
    """LLaVA-1.5's configuration, narrow: CLIP tower, projector, Llama decoder."""
    text = LlamaConfig(
        vocab_size=trained_tokenizer().get_vocab_size(),
        hidden_size=shape.width,
        intermediate_size=shape.text_feed_forward,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=token("<s>"),
        eos_token_id=token("</s>"),
        pad_token_id=token("<pad>"),
        tie_word_embeddings=False,
        # Slow turns in most dimensions, so that heads of 32 can match by content across a picture.
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
    )
    vision = CLIPVisionConfig(
        hidden_size=shape.width,
        intermediate_size=shape.vision_feed_forward,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.heads,
        image_size=IMAGE_SIZE,
        patch_size=shape.patch_size,
        projection_dim=shape.width,
    )
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_index=token(IMAGE_TOKEN),
        image_seq_length=shape.patches**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        pad_token_id=token("<pad>"),  # type: ignore[call-arg]  # taken, but not declared
    )


def new_model(shape: Shape, seed: int) -> LlavaForConditionalGeneration:
    """The model of that seed.

    Output words have variance 1 and matrices keep the variance of what enters them: the usual 0.02 for everything is
    too little at this width. Visual tokens learn to point at output words. Input words are these, turned by a fixed
    rotation, and queries of the decoder start as keys turned back: a word looks at visual tokens that show it, not at
    itself, and copies what else they show; a cell found so is looked for by later layers. From there retrieval forms
    in hundreds of steps, not thousands.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(make_config(shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "layrnorm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith(("bias", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                parameter.zero_()
            elif "embed_tokens" in name or "class_embedding" in name:
                parameter.normal_()
            elif "position_embedding" in name:
                parameter.copy_(grid_positions(shape.width, shape.patches))
            else:
                parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))
        layers = model.model.language_model.layers
        for number, layer in enumerate(layers):
            attention: LlamaAttention = layer.self_attn
            attention.k_proj.weight.mul_(MATCHING)
            attention.q_proj.weight.copy_(attention.k_proj.weight @ turn(shape.width).T)
            if number >= shape.looks_on_from:
                look_on(attention)
            nn.init.orthogonal_(attention.v_proj.weight)
            attention.o_proj.weight.copy_(COPYING * attention.v_proj.weight.T)
        words = model.lm_head.weight.normal_()
        words[list(map(word, CELLS))] = cell_words(shape.width)
        read_as_spoken(model)
    for number in range(shape.own_layers, shape.text_layers):
        layers[number] = layers[number % shape.own_layers]
    return model


@torch.no_grad()
def look_on(attention: LlamaAttention) -> None:
    """Lets half of the heads look for a cell that was found before, not only for one that was read."""
    query, key = attention.q_proj.weight, attention.k_proj.weight
    half = len(query) // 2
    cells = torch.linalg.svd(cell_words(query.shape[1]), full_matrices=False)
    span = cells.Vh[cells.S[0] / 1000 < cells.S]
    query[:half] += key[:half] @ span.T @ span


def cell_words(width: int) -> Tensor:
    """[cells, width]: each the sum of a direction for its row and one for its column, so that neighbours are alike."""
    rows, columns = torch.randn(2, GRID, width, generator=torch.Generator().manual_seed(1))
    return ((rows[:, None] + columns) / math.sqrt(2)).flatten(0, 1)


def turn(width: int) -> Tensor:
    """A rotation, the same every time: [width, width]."""
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(noise).Q


@torch.no_grad()
def read_as_spoken(model: LlavaForConditionalGeneration) -> None:
    """Starts input words from output words, whose logits it brings to an ordinary size."""
    words, embeddings = model.lm_head.weight, model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    words.div_(words.pow(2).mean().sqrt())
    embeddings.weight.copy_(words @ turn(words.shape[1]).T)
    words.mul_(FIRST_LOGITS / math.sqrt(words.shape[1]))


def grid_positions(width: int, side: int) -> Tensor:
    """[1 + patches, width]: sines and cosines of row and column, after a zero row for the class token."""
    at = torch.arange(side, dtype=torch.float32)
    frequencies = torch.pi / side * 1.35 ** torch.arange(width // 4, dtype=torch.float32)
    angles = at[:, None] * frequencies.clamp(max=torch.pi)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    patches = torch.cat([rows, columns], dim=2).flatten(0, 1)
    return torch.cat([torch.zeros(1, width), patches])
