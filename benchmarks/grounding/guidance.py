"""Where the decoder is taught to look while it learns to answer: first at the subject, then at the target.

"What is left of the red circle?" has a subject, the red circle, and a target, the place left of it. Retrieval forms in
a few hundred steps when one head of each layer is told where to look, and hardly at all when it has to find out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Layers whose first head looks at the subject, then at the target. The last ones only speak.
SUBJECT_LAYERS = range(3, 13)
TARGET_LAYERS = range(13, 29)


@dataclass(frozen=True, kw_only=True)
class Guide:
    """Where to look from the positions that are to say a word of an answer.

    rows: int64 [pictures, rows], places on the picture's lines; -1 pads. subject, target: bool [pictures, rows,
    tokens], of the prompt start, or of it and the lines behind it where these show pictures, too. It does not matter
    at which of the tokens a head looks.
    """

    rows: Tensor
    subject: Tensor
    target: Tensor


def guidance_loss(
    queries: Sequence[Tensor], keys: Sequence[Tensor], owner: Tensor, guide: Guide
) -> Tensor:
    """How far the first heads of the guided layers look elsewhere; a mean over layers and rows.

    queries, keys: of every layer, [pictures, start + tokens, head size]. owner: [pictures, tokens], as in `Lines`.
    """
    start = queries[0].shape[1] - owner.shape[1]
    guided = [*SUBJECT_LAYERS, *TARGET_LAYERS]
    rows = guide.rows.clamp(min=0)
    size = queries[0].shape[-1]
    places = (start + rows)[..., None].expand(-1, -1, size)
    query = torch.stack([queries[layer].gather(1, places) for layer in guided], dim=2)
    key = torch.stack([keys[layer] for layer in guided], dim=2)
    logits = torch.einsum("prld,ptld->prlt", query.float(), key.float()) * size**-0.5
    sees = _sees(owner, rows, start)[:, :, None]
    likely = logits.masked_fill(~sees, -1e30).log_softmax(dim=-1)[..., : guide.subject.shape[-1]]
    wanted = torch.stack(
        [guide.subject if layer in SUBJECT_LAYERS else guide.target for layer in guided], dim=2
    )
    elsewhere = -likely.masked_fill(~wanted, -1e30).logsumexp(dim=-1)
    return elsewhere[guide.rows >= 0].mean()


def _sees(owner: Tensor, rows: Tensor, start: int) -> Tensor:
    """Bool [pictures, rows, start + tokens]: the prompt start, and the conversation's tokens up to the row."""
    tokens = owner.shape[1]
    own = owner[:, None, :] == owner.gather(1, rows)[..., None]
    own &= torch.arange(tokens) <= rows[..., None]
    return torch.cat([own.new_ones(*rows.shape, start), own], dim=-1)
