"""Many questions about one picture in one pass, each computed as if it were asked alone.

A picture's prompt start (with its visual tokens) is computed once. Questions are laid out behind each other on lines;
each sees the prompt start and itself, never another question, and its rope positions follow the prompt start's.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration

from benchmarks.grounding.vocabulary import IGNORED, VISUAL_TOKENS, prompt_start, token

ATTENTION = "lines_behind_a_picture"


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Questions with their answers; all tensors are int64 [pictures, lines, length]."""

    ids: Tensor  # what the model reads
    targets: Tensor  # what it is to say next; IGNORED outside answers
    owner: Tensor  # which question of the picture a token belongs to; -1 is padding
    offset: Tensor  # place within its question


def pack(exchanges: list[tuple[tuple[int, ...], tuple[int, ...]]], lines: int, length: int) -> dict:
    """Lays (question tokens, answer tokens) pairs of one picture on lines, as many as fit.

    Returns the fields of `Lines`, [lines, length] each.
    """
    fields = {
        "ids": torch.full((lines, length), token("<pad>")),
        "targets": torch.full((lines, length), IGNORED),
        "owner": torch.full((lines, length), -1),
        "offset": torch.zeros((lines, length), dtype=torch.int64),
    }
    line = used = 0
    for number, (question, answer) in enumerate(exchanges):
        size = len(question) + len(answer) - 1
        if used + size > length:
            line, used = line + 1, 0
        if line == lines:
            break
        here = (line, slice(used, used + size))
        fields["ids"][here] = torch.tensor([*question, *answer[:-1]])
        fields["targets"][line, used + len(question) - 1 : used + size] = torch.tensor(answer)
        fields["owner"][here] = number
        fields["offset"][here] = torch.arange(size)
        used += size
    return fields


def visual_tokens(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """[pictures, 3, size, size], normalised -> [pictures, visual tokens, width]: what the decoder is given."""
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[: model.config.vision_feature_layer + 1]:
        hidden = layer(hidden, attention_mask=None)
    return model.model.multi_modal_projector(hidden[:, 1:])


def answer_logits(model: LlavaForConditionalGeneration, visual: Tensor, lines: Lines) -> Tensor:
    """Logits at all positions with a target, in their order: [targets, vocabulary]."""
    embed = model.get_input_embeddings()
    pictures = visual.shape[0]
    start = torch.tensor(prompt_start())
    first = start.tolist().index(model.config.image_token_index)
    inputs = torch.cat(
        [
            embed(start[:first]).expand(pictures, -1, -1),
            visual,
            embed(start[first + VISUAL_TOKENS :]).expand(pictures, -1, -1),
            embed(lines.ids.flatten(1)),
        ],
        dim=1,
    )
    shared = torch.arange(len(start)).expand(pictures, -1)
    positions = torch.cat([shared, len(start) + lines.offset.flatten(1)], dim=1)
    hidden = model.model.language_model(
        inputs_embeds=inputs,
        position_ids=positions,
        attention_mask=_line_mask(lines, len(start)),
        use_cache=False,
    ).last_hidden_state
    wanted = lines.targets.flatten(1) != IGNORED
    return model.lm_head(hidden[:, len(start) :][wanted])


def _line_mask(lines: Lines, start: int) -> Tensor:
    """Bool [pictures · lines, 1, length, start + length], true where a token looks."""
    owner = lines.owner.flatten(0, 1)
    count, length = owner.shape
    own = (owner[:, :, None] == owner[:, None, :]) & torch.ones(length, length).tril().bool()
    return torch.cat([torch.ones(count, length, start, dtype=torch.bool), own], dim=2)[:, None]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: object
) -> tuple[Tensor, None]:
    """Attention of the prompt start to itself, then of each line to the start and itself.

    query, key, value: [pictures, heads, start + lines · length, head size]; mask as `_line_mask` makes it.
    """
    # Under bf16 autocast too: the backward pass of attention is much faster in fp32 on CPU.
    query, key, value = query.float(), key.float(), value.float()
    pictures, heads, _, size = query.shape
    length = mask.shape[2]
    start = mask.shape[3] - length

    def on_lines(x: Tensor) -> Tensor:
        return x[:, :, start:].unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)

    def with_start(x: Tensor) -> Tensor:
        count = (x.shape[2] - start) // length
        shared = x[:, None, :, :start].expand(-1, count, -1, -1, -1).flatten(0, 1)
        return torch.cat([shared, on_lines(x)], dim=2)

    with torch.autocast("cpu", enabled=False):
        first = F.scaled_dot_product_attention(
            query[:, :, :start], key[:, :, :start], value[:, :, :start], is_causal=True
        )
        rest = F.scaled_dot_product_attention(
            on_lines(query), with_start(key), with_start(value), attn_mask=mask
        )
    rest = rest.view(pictures, -1, heads, length, size).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend)
