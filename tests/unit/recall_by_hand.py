"""`recall` written out token by token with the oracle's layers, for comparing against."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.quality.recall.history import Recall, Turn
from tests.oracle import RoutedOracle
from tests.oracle.decoder import LayerKV
from tests.oracle.selection import highest, last_prompt_row, num_kept


def recalled(oracle: RoutedOracle, turns: Sequence[Turn], recall: Recall) -> Iterator[Tensor]:
    """Logits of every turn's answer. All tokens are known by their position in the conversation."""
    layers, keep_at = oracle._decoder, oracle.keep_at
    kv = [LayerKV() for _ in range(oracle.depth)]
    held: list[list[int]] = [[] for _ in kv]  # in the order of the entries
    parked: dict[int, Tensor] = {}
    pictures: list[int] = []
    begin = 0
    for turn in turns:
        rows = range(begin, begin + len(turn.rows))
        own = [row for row in rows if turn.visual[row - begin]]
        text = [row for row in rows if row not in own]
        asks = begin + turn.end - 1
        state = parked | dict(zip(rows, turn.rows, strict=True))
        waiting: dict[int, Tensor] = {}
        waiting_since: int | None = None
        came: set[int] = set()
        back: list[int] = []
        run = list(rows)
        for layer in range(oracle.depth):
            if layer in keep_at:
                if waiting_since is None:
                    waiting_since, waiting = layer, {row: state[row] for row in own}
                share = keep_at[layer]
                every = [*text, *own, *(row for row in parked if row not in held[layer])]
                at = torch.tensor(every)
                queries, keys, _ = layers.project(layer, torch.stack([state[p] for p in every]), at)
                query = queries[:, every.index(asks)]
                key = {row: keys[:, i] for i, row in enumerate(every)}
                key |= {row: kv[layer].keys[:, i] for i, row in enumerate(held[layer])}
                seen = [*held[layer], *(row for row in text if row <= asks)]

                def attention(rows: list[int], query=query, key=key, seen=seen) -> Tensor:
                    among = [*seen, *(row for row in rows if row not in seen)]
                    row = last_prompt_row(query, torch.stack([key[p] for p in among], dim=1))
                    return torch.stack([row[among.index(p)] for p in rows])

                chosen: list[int] = []
                if own:
                    chosen = highest(attention(own), own, num_kept(len(own), share, len(own)))
                back = []
                if parked and not (recall.text_turns and own):
                    scores = dict(zip(parked, attention(list(parked)), strict=True))
                    absent = [row for row in parked if row not in held[layer]]
                    count = max(1, int(recall.share * num_kept(len(parked), share, len(parked))))
                    of = absent if recall.absent else list(parked)
                    if recall.arrived and waiting_since != layer:
                        of = [row for row in of if row in held[layer] or row in came]
                    best = sorted(of, key=lambda row: (-scores[row], row))[:count]
                    best = [row for row in best if row in absent]
                    most = recall.cap * sum(num_kept(size, share, size) for size in pictures)
                    room = most - len(parked) + len(absent)
                    back = sorted(best[: int(min(room, len(best)))])
                run = [*back, *sorted([*text, *chosen])]
                came |= set(back)
            hidden = torch.stack([state[row] for row in run])
            if back and recall.apart:
                front = sum(row < min(parked) for row in held[layer])
                aside = LayerKV()
                aside.append(kv[layer].keys[:, :front], kv[layer].values[:, :front])
                first = layers.run_layer(layer, hidden[: len(back)], torch.tensor(back), aside)
                kv[layer].append(aside.keys[:, front:], aside.values[:, front:])
                rest = torch.tensor(run[len(back) :])
                hidden = layers.run_layer(layer, hidden[len(back) :], rest, kv[layer])
                hidden = torch.cat([first, hidden])
            else:
                hidden = layers.run_layer(layer, hidden, torch.tensor(run), kv[layer])
            held[layer] += run
            state |= dict(zip(run, hidden, strict=True))
        parked |= waiting
        pictures += [len(own)] if own else []
        begin = rows.stop
        answer = torch.stack([state[row] for row in range(asks, rows.stop)])
        yield oracle.model.lm_head(oracle.model.model.language_model.norm(answer))
