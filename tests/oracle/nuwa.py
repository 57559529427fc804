"""Nüwa on plain transformers models: aggregation in the vision tower, then removal or rerouting in the decoder.

Follows the published code where it differs from the paper: salience is attention alone, proximity falls
linearly, and the decoder's removal goes by attention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from . import nuwa_llava, nuwa_qwen2_5_vl
from .decoder import LayerKV
from .families.prompt import Prompt
from .nuwa_stage1 import aggregate, choose_anchors, num_anchors
from .routed import OracleResult, RoutedOracle
from .selection import attention_rows, highest, num_kept

FAMILIES: dict[str, ModuleType] = {"llava": nuwa_llava, "qwen2_5_vl": nuwa_qwen2_5_vl}


@dataclass(frozen=True)
class NuwaResult(OracleResult):
    """`selected` and `scores` begin with the anchors and the salience of all visual tokens.

    One entry per decision layer follows, with indices into the request's visual tokens as ever.
    """

    # [visual tokens, hidden]: anchors with what they collected, all others as the tower left them.
    visual_embeddings: Tensor

    @property
    def anchor_embeddings(self) -> Tensor:
        """[anchors, hidden], in the order of `selected[0]`."""
        return self.visual_embeddings[self.selected[0]]


@dataclass(frozen=True, kw_only=True)
class NuwaPrompt(Prompt):
    anchors: list[int]  # indices into the visual tokens, ascending
    salience: Tensor  # [visual tokens], fp32


class NuwaOracle(RoutedOracle):
    """Runs requests with `stage1_ratio` of each image's visual tokens before any decision layer.

    `keep` are shares of a request's original visual tokens, one per decision layer; none: all layers
    run the anchors. remove: scored by the layer before the decision layer, from the tokens it ran.
    reroute: scored at the decision layer's input; in variant A the anchors are candidates, in variant
    B all visual tokens are, and whoever is no anchor waits as the vision tower left it.
    """

    def __init__(
        self,
        model_dir: str | PathLike[str],
        *,
        action: Literal["remove", "reroute"],
        variant: Literal["A", "B"] | None = None,
        stage1_ratio: float,
        layers: Sequence[int],
        keep: Sequence[float],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if variant not in (None, "A", "B") or (variant and action == "remove"):
            raise ValueError(
                f"variant {variant!r} is unknown with action {action!r}. Choose A or B with reroute, "
                "or None: variant A with reroute."
            )
        if not 0 < stage1_ratio <= 1:
            raise ValueError(f"stage1_ratio {stage1_ratio} must lie in (0, 1].")
        super().__init__(model_dir, action=action, layers=layers, keep=keep, dtype=dtype)
        model_type = self.model.config.model_type
        if model_type not in FAMILIES:
            raise ValueError(
                f"model type {model_type!r} has no Nüwa. Choose one of: {', '.join(FAMILIES)}."
            )
        self._tower = FAMILIES[model_type]
        self.rejects_return = variant == "B"
        self.stage1_ratio = stage1_ratio

    @torch.inference_mode()
    def run(
        self,
        inputs: Mapping[str, Tensor],
        max_new_tokens: int,
        forced_token_ids: list[int] | None = None,
        stop_at_eos: bool = False,
    ) -> NuwaResult:
        prompt = self._prepare(inputs, max_new_tokens, forced_token_ids)
        visual_embeddings = prompt.embeddings[prompt.visual]
        result = self._generate(prompt, max_new_tokens, forced_token_ids, stop_at_eos, ())
        return NuwaResult(**vars(result), visual_embeddings=visual_embeddings)

    def _prepare(
        self,
        inputs: Mapping[str, Tensor],
        max_new_tokens: int,
        forced_token_ids: list[int] | None,
    ) -> NuwaPrompt:
        """The prompt with aggregated embeddings at the anchors; positions are those of the full prompt."""
        plain = super()._prepare(inputs, max_new_tokens, forced_token_ids)
        visual = plain.visual.nonzero().flatten()
        anchors: list[int] = []
        saliences = [torch.empty(0)]
        before = 0
        for seen in self._tower.look(self.model, inputs):
            num_tokens = len(seen.salience)
            chosen = choose_anchors(
                seen.salience, seen.grid, num_anchors(num_tokens, self.stage1_ratio)
            )
            embeddings = self._tower.to_embeddings(self.model, aggregate(seen, chosen))
            plain.embeddings[visual[before + torch.tensor(chosen)]] = embeddings
            anchors += [before + token for token in chosen]
            saliences.append(seen.salience)
            before += num_tokens
        return NuwaPrompt(**vars(plain), anchors=anchors, salience=torch.cat(saliences))

    def _prefill(
        self, prompt: NuwaPrompt, kv: list[LayerKV], turn_ends: Sequence[int]
    ) -> tuple[Tensor, list[list[int]], list[Tensor]]:
        """As for any schedule, but from the first layer on only anchors and text run."""
        hidden = prompt.embeddings
        visual = prompt.visual.nonzero().flatten().tolist()
        text = (~prompt.visual).nonzero().flatten().tolist()
        anchors = [visual[token] for token in prompt.anchors]
        kept = anchors
        selected, scores = [prompt.anchors], [prompt.salience]
        previous_scores = torch.empty(0)
        for layer in range(self.depth):
            if layer in self.keep_at:
                if self.action == "remove":
                    candidates, layer_scores = kept, previous_scores
                else:
                    candidates = visual if self.rejects_return else anchors
                    layer_scores = self._score(layer, hidden, prompt.positions, text, candidates)
                count = num_kept(len(visual), self.keep_at[layer], len(candidates))
                kept = highest(layer_scores, candidates, count)
                selected.append([visual.index(row) for row in kept])
                scores.append(layer_scores)
            present = sorted(text + kept)
            rows = torch.tensor(present)
            entering, positions = hidden[rows], prompt.positions[..., rows]
            if self.action == "remove" and layer + 1 in self.keep_at:
                row = self._last_rows(layer, entering, positions)
                previous_scores = row[[present.index(p) for p in kept]]
            hidden[rows] = self._decoder.run_layer(layer, entering, positions, kv[layer])
        return hidden[-1], selected, scores

    def _last_rows(self, layer: int, hidden: Tensor, positions: Tensor) -> Tensor:
        """Attention of the last prompt tokens in `layer`, combined as the family's code does.

        hidden: [tokens, hidden], the layer's input, of the tokens that run in it. Returns [tokens], fp32.
        """
        query, key, _ = self._decoder.project(layer, hidden, positions)
        last_queries = query[:, -self._tower.NUM_QUERIES :]
        weights = attention_rows(last_queries, self._decoder.repeat_heads(layer, key))
        return self._tower.combine_rows(weights)
