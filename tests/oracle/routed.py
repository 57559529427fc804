"""FastV/PDrop removal and Reroute on plain transformers models, one request at a time.

Written for reading and for comparing against, not for speed: loops, fp32, explicit K/V per layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from .decoder import Decoder, LayerKV
from .families import family_of
from .families.prompt import Prompt
from .selection import highest, last_prompt_row, num_kept


@dataclass(frozen=True)
class OracleResult:
    """What one request yields; `selected` and `scores` have one entry per decision layer.

    For a request without visual tokens these entries are empty.
    """

    token_ids: list[int]  # generated, greedy or forced
    logprobs: Tensor  # [generated, vocab], fp32
    selected: list[list[int]]  # kept, as indices into the request's visual tokens, ascending
    scores: list[Tensor]  # fp32 [candidates], ascending: all, or what is left (remove)
    kv_lens: list[int]  # K/V entries per decoder layer at the end; the last token is never fed


class RoutedOracle:
    """Runs requests under one schedule; empty `layers` runs them dense.

    `keep` are shares of a request's original visual tokens, one per decision layer. The visual
    tokens of all images and videos of a request are ranked jointly, by the last prompt token; given
    the ends of its turns, those of a turn by the turn's last token, among themselves, and `keep` are
    shares of theirs. accumulates: by the sum of the last prompt token's attention at this decision
    and all earlier ones; with reroute.
    """

    def __init__(
        self,
        model_dir: str | PathLike[str],
        *,
        action: Literal["remove", "reroute"],
        layers: Sequence[int],
        keep: Sequence[float],
        accumulates: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(
            model_dir, attn_implementation="eager", dtype=dtype
        ).eval()
        self._family = family_of(self.model.config)
        self._text = self.model.model.language_model
        self._decoder = Decoder(self._text)
        self.depth = len(self._decoder.layers)
        _check_schedule(action, layers, keep, self.depth)
        _check_deepstack(layers, self._family.num_deepstack_levels(self.model.config))
        self.action, self.accumulates = action, accumulates
        self.keep_at = dict(zip(layers, keep, strict=True))

    @torch.inference_mode()
    def run(
        self,
        inputs: Mapping[str, Tensor],
        max_new_tokens: int,
        forced_token_ids: list[int] | None = None,
        stop_at_eos: bool = False,
        turn_ends: Sequence[int] = (),
    ) -> OracleResult:
        """Generates greedily, or feeds `forced_token_ids` and records what was predicted.

        `inputs` is what the model's processor makes of one request: input_ids [1, prompt] with one
        placeholder per visual token, and the pixels, grids and sizes its family needs. turn_ends: one
        past the last token of each turn; where not given, the whole prompt is one.
        """
        prompt = self._prepare(inputs, max_new_tokens, forced_token_ids)
        ends = turn_ends or [len(prompt.visual)]
        return self._generate(prompt, max_new_tokens, forced_token_ids, stop_at_eos, ends)

    def _prepare(
        self,
        inputs: Mapping[str, Tensor],
        max_new_tokens: int,
        forced_token_ids: list[int] | None,
    ) -> Prompt:
        _check_request(inputs["input_ids"], max_new_tokens, forced_token_ids)
        prompt = self._family.prepare(self.model, inputs)
        _check_last_token(prompt)
        return prompt

    def _generate(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        forced_token_ids: list[int] | None,
        stop_at_eos: bool,
        turn_ends: Sequence[int],
    ) -> OracleResult:
        kv = [LayerKV() for _ in range(self.depth)]
        last_hidden, selected, scores = self._prefill(prompt, kv, turn_ends)
        token_ids: list[int] = []
        logprobs: list[Tensor] = []
        while True:
            logprobs.append(self._logprobs(last_hidden))
            step = len(token_ids)
            greedy = int(logprobs[-1].argmax())
            token_ids.append(greedy if forced_token_ids is None else forced_token_ids[step])
            stopped = stop_at_eos and token_ids[-1] in self._eos_token_ids
            if stopped or len(token_ids) == max_new_tokens:
                break
            components = prompt.positions.shape[:-1]
            positions = torch.full((*components, 1), prompt.next_position + step)
            last_hidden = self._decode(token_ids[-1], positions, kv)
        return OracleResult(
            token_ids=token_ids,
            logprobs=torch.stack(logprobs),
            selected=selected,
            scores=scores,
            kv_lens=[len(layer_kv) for layer_kv in kv],
        )

    def _prefill(
        self, prompt: Prompt, kv: list[LayerKV], turn_ends: Sequence[int]
    ) -> tuple[Tensor, list[list[int]], list[Tensor]]:
        """Runs the prompt, filling `kv`; returns the last prompt token's hidden state.

        A turn is ranked by the last token before its end: its own candidates, among them, the text
        before it and what this same decision has just kept of earlier turns.

        `hidden` always holds the whole prompt. A layer reads and writes the rows of its tokens
        only, so a deferred token's row waits unchanged until a later decision picks it.
        """
        hidden = prompt.embeddings
        visual = prompt.visual.nonzero().flatten().tolist()
        text = (~prompt.visual).nonzero().flatten().tolist()
        turns = _turns_of(visual, turn_ends)
        kept = visual
        selected: list[list[int]] = []
        scores: list[Tensor] = []
        for layer in range(self.depth):
            if layer in self.keep_at:
                before = set(kept if self.action == "remove" else visual)
                kept, of_layer = [], []
                for end, own in turns:
                    candidates = [row for row in own if row in before]
                    present = [row for row in text if row < end] + kept
                    turn_scores = self._score(layer, hidden, prompt.positions, present, candidates)
                    if self.accumulates and scores:
                        assert len(turns) == 1
                        turn_scores = turn_scores + scores[-1]
                    count = num_kept(len(own), self.keep_at[layer], len(candidates))
                    kept = kept + highest(turn_scores, candidates, count)
                    of_layer.append(turn_scores)
                selected.append([visual.index(row) for row in kept])
                scores.append(torch.cat(of_layer) if of_layer else torch.zeros(0))
            rows = torch.tensor(sorted(text + kept))
            positions = prompt.positions[..., rows]
            hidden[rows] = self._decoder.run_layer(layer, hidden[rows], positions, kv[layer])
            if layer < len(prompt.deepstack):
                hidden += prompt.deepstack[layer]
        return hidden[-1], selected, scores

    def _score(
        self, layer: int, hidden: Tensor, positions: Tensor, text: list[int], candidates: list[int]
    ) -> Tensor:
        """The last text token's attention to each candidate, at the input of `layer`.

        hidden: [prompt, hidden]; positions: [prompt] or [3, prompt]. The softmax runs over text (and
        whatever else is given as text) and candidates. Returns [candidates], fp32.
        """
        present = sorted(text + candidates)
        rows = torch.tensor(present)
        query, key, _ = self._decoder.project(layer, hidden[rows], positions[..., rows])
        row = last_prompt_row(query[:, -1], self._decoder.repeat_heads(layer, key))
        return row[[present.index(p) for p in candidates]]

    def _decode(self, token_id: int, positions: Tensor, kv: list[LayerKV]) -> Tensor:
        """Feeds one generated token through all layers; returns its hidden state, [hidden].

        positions: [1] or [3, 1].
        """
        hidden = self._text.embed_tokens(torch.tensor([token_id]))
        for layer in range(self.depth):
            hidden = self._decoder.run_layer(layer, hidden, positions, kv[layer])
        return hidden[0]

    def _logprobs(self, hidden: Tensor) -> Tensor:
        """hidden: [hidden], as it leaves the last layer. Returns [vocab], fp32."""
        logits = self.model.lm_head(self._text.norm(hidden))
        return logits.float().log_softmax(dim=-1)

    @property
    def _eos_token_ids(self) -> set[int]:
        eos = self.model.generation_config.eos_token_id
        if eos is None:
            eos = self._text.config.eos_token_id
        return set(eos) if isinstance(eos, list) else {eos}


def _turns_of(visual: list[int], ends: Sequence[int]) -> list[tuple[int, list[int]]]:
    """End and visual rows of each turn that has any."""
    turns, begin = [], 0
    for end in ends:
        own = [row for row in visual if begin <= row < end]
        begin = end
        if own:
            turns.append((end, own))
    assert sum(len(own) for _, own in turns) == len(visual), "a picture belongs to no turn"
    return turns


def _check_schedule(action: str, layers: Sequence[int], keep: Sequence[float], depth: int) -> None:
    if action not in ("remove", "reroute"):
        raise ValueError(f"action {action!r} is unknown. Choose one of: remove, reroute.")
    if len(layers) != len(keep):
        raise ValueError(
            f"layers {list(layers)} and keep {list(keep)} differ in length. Give one ratio per decision layer."
        )
    increasing = all(a < b for a, b in pairwise(layers))
    if not increasing or any(not 1 <= layer < depth for layer in layers):
        raise ValueError(f"layers {list(layers)} must increase strictly within [1, {depth - 1}].")
    if any(not 0 < ratio <= 1 for ratio in keep):
        raise ValueError(f"keep {list(keep)} must lie in (0, 1].")


def _check_deepstack(layers: Sequence[int], num_levels: int) -> None:
    if any(layer < num_levels for layer in layers):
        raise ValueError(
            f"layers {list(layers)} must not be below {num_levels}: features of the vision tower are added "
            f"to all visual tokens after each of the first {num_levels} decoder layers."
        )


def _check_request(
    input_ids: Tensor, max_new_tokens: int, forced_token_ids: list[int] | None
) -> None:
    if input_ids.dim() != 2 or len(input_ids) != 1:
        raise ValueError(f"input_ids {list(input_ids.shape)} must be one request, [1, tokens].")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1.")
    if forced_token_ids is not None and len(forced_token_ids) < max_new_tokens:
        raise ValueError(
            f"forced_token_ids has {len(forced_token_ids)} tokens, max_new_tokens asks for "
            f"{max_new_tokens}. Give as many tokens as steps."
        )


def _check_last_token(prompt: Prompt) -> None:
    if not len(prompt.visual) or prompt.visual[-1]:
        raise ValueError(
            "input_ids must end in a text token: it is the one that scores the visual tokens "
            "and predicts the first new token. Append the text that follows the image."
        )
