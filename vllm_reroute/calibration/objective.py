"""What a schedule loses: how much of what the last prompt token looks at does not run.

Rows come from a dense pass, where every token runs every layer, so this is an estimate: routed, later
layers see other states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_reroute.schedule.budget import REFERENCE_VISUAL_TOKENS, num_kept
from vllm_reroute.schedule.routing_schedule import RoutingSchedule


@dataclass(frozen=True, kw_only=True)
class Looks:
    """All samples. sizes: visual tokens of each, int [samples].

    ranking: attention, which decisions rank by; worth: what is lost with a token. Both
    [samples, layers, most visual tokens]; beyond a sample's tokens ranking is -1 and worth 0, and so
    it is in layers that are dense in any schedule: nothing can be lost there.
    """

    ranking: np.ndarray
    worth: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(
        cls, rows: Sequence[Mapping[str, np.ndarray]], objective: str, first_layer: int
    ) -> Looks:
        """rows: of every sample, by their name in `recording.Rows`, [layers, visual tokens].

        first_layer: the lowest decision layer the model allows.
        """
        sizes = np.array([each["attention"].shape[1] for each in rows])
        shape = (len(rows), len(rows[0]["attention"]), int(sizes.max()))
        ranking, worth = np.full(shape, -1.0, np.float32), np.zeros(shape, np.float32)
        for i, (each, size) in enumerate(zip(rows, sizes, strict=True)):
            ranking[i, :, :size] = each["attention"]
            worth[i, first_layer:, :size] = _worth(each, objective)[first_layer:]
        return cls(ranking=ranking, worth=worth, sizes=sizes)

    @property
    def num_layers(self) -> int:
        return self.ranking.shape[1]

    @property
    def reference(self) -> int:
        """Visual tokens that counts are stated for: every sample's, or the reference image's."""
        alike = (self.sizes == self.sizes[0]).all()
        return int(self.sizes[0]) if alike else REFERENCE_VISUAL_TOKENS

    @cached_property
    def totals(self) -> np.ndarray:
        """[samples, layers]: what there is to lose."""
        return self.worth.sum(axis=2, dtype=np.float64)

    def some(self, which: np.ndarray) -> Looks:
        """These samples, by index; one may occur several times."""
        return Looks(ranking=self.ranking[which], worth=self.worth[which], sizes=self.sizes[which])

    def counts(self, ratio: float) -> np.ndarray:
        """Tokens of each sample that a stage of this ratio keeps."""
        return np.array([num_kept(int(size), ratio) for size in self.sizes])

    def order(self, layer: int, candidates: np.ndarray | None = None) -> np.ndarray:
        """Per sample its tokens, highest ranked at `layer` first, [samples, most visual tokens].

        candidates: bool [samples, most visual tokens]; others come last.
        """
        ranking = self.ranking[:, layer]
        if candidates is not None:
            ranking = np.where(candidates, ranking, -1.0)
        return np.argsort(-ranking, axis=1, kind="stable")

    def kept_worth(self, order: np.ndarray, layers: slice, counts: np.ndarray) -> np.ndarray:
        """Worth of the first tokens of `order` at these layers.

        counts: how many, [samples, choices]. Returns fp64 [samples, layers, choices].
        """
        first = order[:, None, : counts.max()]
        sorted_worth = np.take_along_axis(self.worth[:, layers], first, axis=2)
        summed = sorted_worth.cumsum(axis=2, dtype=np.float64)
        return np.take_along_axis(summed, counts[:, None] - 1, axis=2)


def _worth(rows: Mapping[str, np.ndarray], objective: str) -> np.ndarray:
    """What each token is worth at each layer, [layers, visual tokens].

    attention: the last prompt token's attention to it. contribution: what it adds to that token's
    stream. lasting: that, and what it adds in later layers as far as this layer changes its state,
    since a token that was skipped comes back as it was.
    """
    if objective != "lasting":
        return rows[objective]
    contribution = rows["contribution"]
    later = contribution[::-1].cumsum(axis=0)[::-1] - contribution
    return contribution + rows["change"] * later


def lost(looks: Looks, schedule: RoutingSchedule) -> np.ndarray:
    """What a schedule loses, fp64 [samples, layers], of the `totals`.

    Its decisions are the decoder's; a vision encoder's cannot be judged from these rows.
    """
    loss = np.zeros(looks.totals.shape)
    candidates = None
    edges = (*schedule.layers[1:], schedule.num_layers)
    for layer, end, ratio in zip(schedule.layers, edges, schedule.keep, strict=True):
        order, counts = looks.order(layer, candidates), looks.counts(ratio)
        stage = slice(layer, end)
        kept = looks.kept_worth(order, stage, counts[:, None])[..., 0]
        loss[:, stage] = looks.totals[:, stage] - kept
        if not schedule.reroutes:
            candidates = first_of(order, counts)
    return loss


def first_of(order: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """bool [samples, most visual tokens]: the first `counts` [samples] tokens of `order`."""
    chosen = np.zeros(order.shape, dtype=bool)
    first = np.arange(order.shape[1]) < counts[:, None]
    np.put_along_axis(chosen, order, first, axis=1)
    return chosen


def share_lost(loss: np.ndarray, totals: np.ndarray) -> float:
    """Of all samples and layers together. Both [samples, layers]."""
    return float(loss.sum() / totals.sum())
