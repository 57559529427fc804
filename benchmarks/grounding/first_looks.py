"""How an unguided decoder starts to look: alike in all layers, so that nothing is said of depth.

The stream has room for what a word says, for what was read of other words, and for what was found in the picture, apart
from each other. The last head of a layer reads: words copy what near words say. The others match: they look at visual
tokens that show what was read, and copy what else these show; the first half of them also look for a place that was
found before.
"""

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from benchmarks.grounding.new_model import HEAD_SIZE, read_as_spoken
from benchmarks.grounding.vocabulary import CELLS, attribute_tokens, encode, word

# Words that say what is asked of the things that others name.
ASKING_WORDS = ("left", "right", "above", "below")
FIRST_WORDS = ("Where", "What")
# Of the pairs of rotary dimensions, with a base of 1e10: in one a question's own words are near, and what precedes the
# picture is not; in all after it everything is near.
READING_PAIR = 2
SLOW = [
    d for pair in range(READING_PAIR + 1, HEAD_SIZE // 2) for d in (pair, pair + HEAD_SIZE // 2)
]
# Strength of matching and of reading, and of copying in either.
MATCHING, READING = 4.0, 0.9
COPYING, READ_COPYING = 0.3, 3.0
# Of every word's own vector: what all words share, by which they are read.
MARK = 0.5


@torch.no_grad()
def start_looking(model: LlavaForConditionalGeneration) -> None:
    """Sets input words and all attention of the decoder, from output words as they are now."""
    read_as_spoken(model)
    words = model.lm_head.weight
    spoken = words / words.pow(2).mean().sqrt()
    width, room = words.shape[1], len(SLOW)
    generator = torch.Generator().manual_seed(3)
    shown = [token for name in ("cell", "colour", "shape") for token in attribute_tokens()[name]]
    asking = [*map(word, ASKING_WORDS), *(encode(each)[0] for each in FIRST_WORDS)]
    # Rows of an orthonormal frame: what shown words differ in as far as a head is wide, then what they do not.
    frame = torch.linalg.svd(spoken[shown]).Vh
    found, said, read, mark, asking_said, asking_read, rest = frame.split(
        [room, room, room, 1, len(asking), len(asking), width - 3 * room - 2 * len(asking) - 1]
    )
    cells = torch.linalg.svd(spoken[list(map(word, CELLS))] @ found.T, full_matrices=False)
    cell_part = cells.Vh[cells.S[0] / 10 < cells.S]

    says = width**0.5 * MARK * mark.expand(len(words), -1)
    others = torch.randn(len(words), len(rest), generator=generator) @ rest
    others[shown] = spoken[shown] @ found.T @ said
    others[asking] = width**0.5 * 0.7 * asking_said
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    embeddings.weight.copy_(says + others)

    near = torch.zeros(HEAD_SIZE)
    near[READING_PAIR] = READING
    heads = width // HEAD_SIZE
    for layer in dict.fromkeys(model.model.language_model.layers):
        attention = layer.self_attn
        query, key, value, out = (
            part.weight
            for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        for head in range(heads):
            first = head * HEAD_SIZE
            mine = slice(first, first + HEAD_SIZE)
            query[mine] = key[mine] = value[mine] = 0.0
            if head == heads - 1:
                query[mine] = key[mine] = torch.outer(near, mark[0])
                value[mine] = torch.cat([said, asking_said])
                out[:, mine] = READ_COPYING * torch.cat([read, asking_read]).T
                continue
            slow, mixed = [first + d for d in SLOW], mixing(room, generator)
            key[slow] = MATCHING * mixed @ found
            query[slow] = MATCHING * mixed @ read
            if head < heads // 2:
                query[slow] += MATCHING * mixed @ cell_part.T @ cell_part @ found
            value[first : first + room] = mixing(room, generator) @ found
            out[:, mine] = COPYING * value[mine].T


def mixing(size: int, generator: torch.Generator) -> Tensor:
    """A rotation: [size, size]."""
    return torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
