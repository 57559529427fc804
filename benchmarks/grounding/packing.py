"""Many conversations about one picture in one pass, each computed as if it were held alone.

A picture's prompt start (with its visual tokens) is computed once. Conversations, most of them one question, are laid
out behind each other on lines; each sees the prompt start and itself, never another one, and its rope positions follow
the prompt start's. A later turn may bring a second picture: that of the batch's next picture, the last one's the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaForConditionalGeneration

from benchmarks.grounding import layer_passes
from benchmarks.grounding.vocabulary import IGNORED, prompt_start, token


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Conversations: questions with their answers; all tensors are int64 [pictures, lines, length]."""

    ids: Tensor  # what the model reads
    targets: Tensor  # what it is to say next; IGNORED outside answers
    owner: Tensor  # which conversation about the picture a token belongs to; -1 is padding
    question: (
        Tensor  # which question about the picture, counted through its conversations; -1 is padding
    )
    offset: Tensor  # place within its conversation


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a pass over lines yields.

    logits: [targets, vocabulary] at all positions with a target, in their order. queries, keys: per layer, of the
    first head, [pictures, start + lines · length, head size].
    """

    logits: Tensor
    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]


# Token ids of a question, from where the last answer ended, and of its answer, which ends with `</s>`.
Exchange = tuple[tuple[int, ...], tuple[int, ...]]


def pack(conversations: Sequence[Sequence[Exchange]], lines: int, length: int) -> dict:
    """Lays conversations about one picture on lines, as many as fit. An answer's end is said, but not read.

    Returns the fields of `Lines`, [lines, length] each.
    """
    fields = {
        "ids": torch.full((lines, length), token("<pad>")),
        "targets": torch.full((lines, length), IGNORED),
        "owner": torch.full((lines, length), -1),
        "question": torch.full((lines, length), -1),
        "offset": torch.zeros((lines, length), dtype=torch.int64),
    }
    line = used = asked = 0
    for number, conversation in enumerate(conversations):
        size = sum(len(question) + len(answer) - 1 for question, answer in conversation)
        if used + size > length:
            line, used = line + 1, 0
        if line == lines:
            break
        here = slice(used, used + size)
        fields["owner"][line, here] = number
        fields["offset"][line, here] = torch.arange(size)
        for question, answer in conversation:
            end = used + len(question) + len(answer) - 1
            fields["ids"][line, used:end] = torch.tensor([*question, *answer[:-1]])
            fields["targets"][line, used + len(question) - 1 : end] = torch.tensor(answer)
            fields["question"][line, used:end] = asked
            used, asked = end, asked + 1
    return fields


def visual_tokens(
    model: LlavaForConditionalGeneration,
    pixels: Tensor,
    dtype: torch.dtype = torch.float32,
    layer=layer_passes.vision_layer,
) -> Tensor:
    """[pictures, 3, size, size], normalised -> fp32 [pictures, visual tokens, width]: what the decoder is given."""
    tower, config = model.model.vision_tower, model.config
    assert isinstance(config.vision_config, CLIPVisionConfig)
    assert isinstance(config.vision_feature_layer, int)
    heads = config.vision_config.num_attention_heads
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for each in tower.encoder.layers[: config.vision_feature_layer + 1]:
        hidden = layer(hidden, heads, dtype, *layer_passes.vision_weights(each))
    return model.model.multi_modal_projector(hidden[:, 1:])


def answer_pass(
    model: LlavaForConditionalGeneration,
    visual: Tensor,
    lines: Lines,
    dtype: torch.dtype = torch.float32,
    layer=layer_passes.decoder_layer,
) -> Pass:
    """The decoder over pictures' prompt starts and the lines behind them. visual: as `visual_tokens` gives it."""
    decoder, embed = model.model.language_model, model.get_input_embeddings()
    pictures = visual.shape[0]
    start = torch.tensor(prompt_start(visual.shape[1]))
    first = start.tolist().index(model.config.image_token_index)
    stream = torch.cat(
        [
            embed(start[:first]).expand(pictures, -1, -1),
            visual,
            embed(start[first + visual.shape[1] :]).expand(pictures, -1, -1),
            _embedded(embed, lines.ids.flatten(1), visual, model.config.image_token_index),
        ],
        dim=1,
    )
    shared = torch.arange(len(start)).expand(pictures, -1)
    positions = torch.cat([shared, len(start) + lines.offset.flatten(1)], dim=1)
    cos, sin = (turn[:, None] for turn in decoder.rotary_emb(stream, positions))
    mask = _line_mask(lines, len(start))
    queries, keys = [], []
    for each in decoder.layers:
        stream, query, key = layer(
            stream, cos, sin, mask, each.self_attn.config.num_attention_heads, dtype,
            *layer_passes.decoder_weights(each),
        )  # fmt: skip
        queries.append(query)
        keys.append(key)
    wanted = lines.targets.flatten(1) != IGNORED
    logits = model.lm_head(decoder.norm(stream[:, len(start) :][wanted]))
    return Pass(logits=logits, queries=tuple(queries), keys=tuple(keys))


def _embedded(embed: nn.Module, ids: Tensor, visual: Tensor, image_token: int) -> Tensor:
    """[pictures, tokens] -> [pictures, tokens, width]; image tokens are the next picture's visual tokens."""
    embedded = embed(ids)
    second = ids == image_token
    if second.any():
        embedded = embedded.index_put((second,), visual.roll(-1, 0)[second.any(1)].flatten(0, 1))
    return embedded


def _line_mask(lines: Lines, start: int) -> Tensor:
    """Bool [pictures · lines, 1, length, start + length], true where a token looks."""
    owner = lines.owner.flatten(0, 1)
    count, length = owner.shape
    own = (owner[:, :, None] == owner[:, None, :]) & torch.ones(length, length).tril().bool()
    return torch.cat([torch.ones(count, length, start, dtype=torch.bool), own], dim=2)[:, None]
