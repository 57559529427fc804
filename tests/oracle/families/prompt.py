"""One request's prompt as the decoder receives it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Prompt:
    embeddings: Tensor  # [tokens, hidden], visual features in place
    visual: Tensor  # bool [tokens]
    positions: Tensor  # [tokens], or [3, tokens] with M-RoPE: time, height, width
    next_position: int  # of the first generated token, in every component
    # Per decoder layer, from the first: what is added to its output, [tokens, hidden], text rows 0.
    deepstack: list[Tensor] = field(default_factory=list)


def embed(
    model: nn.Module, input_ids: Tensor, features: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Token embeddings with features in place of their placeholders.

    input_ids: [tokens]; features: placeholder token -> [features, hidden], in order of position.
    Returns embeddings [tokens, hidden] and which of them are visual, bool [tokens].
    """
    visual = torch.isin(input_ids, torch.tensor(list(features)))
    # A placeholder may lie outside the vocabulary; its embedding is replaced anyway.
    embeddings = model.get_input_embeddings()(input_ids.masked_fill(visual, 0))
    for token, rows in features.items():
        put(embeddings, input_ids == token, rows)
    return embeddings, visual


def put(target: Tensor, where: Tensor, rows: Tensor) -> None:
    """target[where] = rows, which must be as many."""
    if len(rows) != int(where.sum()):
        raise ValueError(
            f"input_ids has {int(where.sum())} placeholders of an image or video, but the pixels give "
            f"{len(rows)} features. Expand every image or video to one placeholder per feature."
        )
    target[where] = rows.to(target.dtype)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The features of all images or videos of a request, [features, hidden]."""
    return torch.cat(list(parts))


def nothing(model: nn.Module) -> Tensor:
    """The features of no image, [0, hidden]."""
    return torch.empty(0, model.config.text_config.hidden_size)


def in_sequence(embeddings: Tensor, visual: Tensor) -> Prompt:
    """A prompt whose positions are simply counted."""
    return Prompt(
        embeddings=embeddings,
        visual=visual,
        positions=torch.arange(len(embeddings)),
        next_position=len(embeddings),
    )
