"""Index tensors over the image prompts a step decides about, in the token layout a decision sees."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from vllm_reroute.plan.step_plan import ImagePrefill, Places, StepPlan
from vllm_reroute.routing.prompt_table import (
    PromptTable,
    as_numbers,
    earlier_turns,
    first_of_each,
    hidden_keys,
    ranges,
    shared_text,
)
from vllm_reroute.to_device import to_device

if TYPE_CHECKING:
    from vllm_reroute.routing.held_tokens import HeldTokens


T = TypeVar("T")


class Memory:
    """Things by name, each made when it is first asked for."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made


@dataclass(frozen=True)
class QueryRows:
    """The rows that score, of one number n of tokens per prompt.

    rows: [requests * n] int64, the layout's rows of the prompts' last n tokens, in order. behind_keys:
    [s + P + requests * n] int64, `PromptRows.key_rows`, then `rows`. weights: fp32 [requests, n], of
    each row in the mean; None for n = 1. hidden: bool [requests, n, width], keys a row does not see;
    None where all rows see all of them.
    """

    rows: torch.Tensor
    behind_keys: torch.Tensor
    weights: torch.Tensor | None
    hidden: torch.Tensor | None


@dataclass(frozen=True)
class PromptRows:
    """Prompts in a token layout: that of the candidates, or of the stage before.

    What comes before a prompt's first candidate is in the stages' K/V already, *cached*: text, and
    what each stage has kept of earlier turns. A decision looks at all tokens that are present up to
    the turn's end, cached ones first, as a padded table [requests, width].

    rows: [P] int64, the layout's rows of the prompts' tokens, request by request.
    table: [requests, width] int64, the row of each place; that of the prompt's last token, which is
    text, where a place has none. keys: [requests * width] int64, where each place's key is among
    those of all cached tokens followed by those of `rows`.
    last: [requests] int64, the row of each last prompt token, which scores.
    lens: [requests], tokens present per prompt. num_cached: [requests], of them cached.
    num_visual: visual tokens of the turn present per prompt. num_rows: rows of the layout.
    prefills: whose prompts these are. batch_rows: their rows in the step's batch.
    shared: K/V places of text that becomes shareable in this step; none where no prompt has cached
    text. key_rows: [s + P] int64, the layout's rows of that text, then `rows`. key_and_last_rows: then `last`.
    past_end: bool [requests, 1, width], places behind a prompt's end; None where there are none.
    held: bool [requests, width], visual tokens of earlier turns that the stage holds: they are cached,
    so as candidates they are no keys, and never chosen; None where no prompt ranks earlier turns.
    in_step, in_layout: what stays the same while the tokens that are cached do, and while the layout does.
    """

    rows: torch.Tensor
    table: torch.Tensor
    keys: torch.Tensor
    last: torch.Tensor
    lens: tuple[int, ...]
    num_cached: tuple[int, ...]
    num_visual: tuple[int, ...]
    num_rows: int
    prefills: tuple[ImagePrefill, ...]
    batch_rows: tuple[int, ...]
    shared: Places
    key_rows: torch.Tensor
    key_and_last_rows: torch.Tensor
    past_end: torch.Tensor | None
    held: torch.Tensor | None
    in_step: Memory
    in_layout: Memory = field(default_factory=Memory, repr=False)
    _first: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict, repr=False)
    _query_rows: dict[int, QueryRows] = field(default_factory=dict, repr=False)

    @property
    def width(self) -> int:
        return max(self.lens)

    @property
    def are_all_rows(self) -> bool:
        """Whether the layout holds nothing but these prompts: `rows` then counts from 0 up."""
        return sum(self.lens) - sum(self.num_cached) == self.num_rows

    @cached_property
    def is_layout(self) -> bool:
        """Whether there is one prompt, all in the layout, and nothing else: its places are the rows."""
        return len(self.lens) == 1 and not self.num_cached[0] and self.are_all_rows

    @cached_property
    def cached(self) -> Places:
        """The cached tokens, by their places in the K/V of the stage decided for."""
        counts = np.array(self.num_cached, dtype=np.int64)
        request = np.array(self.batch_rows, dtype=np.int64).repeat(counts)
        return Places(request, ranges(np.zeros_like(counts), counts))

    @cached_property
    def in_pages(self) -> Places:
        """The tokens of `shared`, then those of `cached`."""
        both = self.shared, self.cached
        return Places(
            np.concatenate([places.request for places in both]),
            np.concatenate([places.position for places in both]),
        )

    def first_of_each(self, counts: Sequence[int]) -> torch.Tensor:
        """int64 [sum of counts]: the first entries of each row of a table [requests, largest count]."""
        counts = tuple(counts)
        if counts not in self._first:
            self._first[counts] = to_device(first_of_each(counts), self.rows.device)
        return self._first[counts]

    def query_rows(self, n: int) -> QueryRows:
        """The rows of the prompts' last n tokens, made once for all decisions in this layout.

        The rows of a prompt shorter than n count from its first token; others weigh nothing.
        """
        if n not in self._query_rows:
            rows, behind_keys, weights = self.last, self.key_and_last_rows, None
            hidden = self.past_end
            if n > 1:
                device, lens = self.rows.device, np.array(self.lens)
                back = np.arange(n)[::-1]
                present = back < (lens - np.array(self.num_cached))[:, None]
                rows = (rows[:, None] - to_device(np.where(present, back, 0), device)).flatten()
                behind_keys = torch.cat((self.key_rows, rows))
                share = (present / present.sum(axis=1, keepdims=True)).astype(np.float32)
                weights, hidden = to_device(share, device), to_device(hidden_keys(lens, n), device)
            if self.held is not None:
                held = self.held.unsqueeze(1)
                hidden = held if hidden is None else hidden | held
            self._query_rows[n] = QueryRows(
                rows=rows, behind_keys=behind_keys, weights=weights, hidden=hidden
            )
        return self._query_rows[n]

    @classmethod
    def of(
        cls,
        plan: StepPlan,
        layout: int | None,
        device: torch.device,
        stage: int = 0,
        *,
        of: int = 0,
        in_step: Memory | None = None,
        held: HeldTokens | None = None,
    ) -> PromptRows:
        """Prompts as laid out in a stage; None: as candidates of the first decision.

        stage: the one that is decided for. of: the one whose K/V holds the cached tokens. Stages
        differ in it where earlier turns have been decided. in_step: that of the step's other layouts
        with the same cached tokens. held: what stages hold, for prompts that rank earlier turns.
        """
        prefills = plan.prefills
        lengths = plan.candidates if layout is None else plan.stages[layout]
        places = PromptTable.of(prefills, lengths, layout, of)
        shared, shared_rows = shared_text(plan, lengths)
        earlier, first_earlier = earlier_turns(prefills, of, places.first_own)
        # Whatever the decision for this stage needs goes to the device in one copy.
        kept = tuple(p.turn.kept[stage] for p in prefills)
        nothing = shared_rows[:0]
        hidden = hidden_keys(places.lens, 1) if places.is_padded else nothing
        packed = (
            shared_rows,
            places.rows,
            places.last,
            places.table,
            places.keys,
            first_of_each(kept) if min(kept) < max(kept) else nothing,
            as_numbers(hidden) if hidden.size else nothing,
            first_earlier,
        )
        on_device = to_device(np.concatenate(packed), device)
        key_and_last_rows = on_device[: sum(map(len, packed[:3]))]
        _, rows, last, table, keys, first, past_end, first_earlier = on_device.split(
            [len(part) for part in packed]
        )
        count, width = len(prefills), int(places.lens.max())
        is_held = None
        if len(earlier):
            assert held is not None, "without it nobody could look back"
            is_held = held.among(of, earlier, first_earlier, (count, width))
        is_past_end = None
        if len(past_end):
            is_past_end = past_end.view(torch.bool)[: hidden.size].view(hidden.shape)
        return cls(
            rows=rows,
            table=table.view(count, width),
            keys=keys,
            last=last,
            lens=tuple(places.lens.tolist()),
            num_cached=tuple(places.cached.tolist()),
            num_visual=places.num_visual,
            num_rows=lengths.num_tokens,
            prefills=prefills,
            batch_rows=tuple(p.index for p in prefills),
            shared=shared,
            key_rows=key_and_last_rows[:-count],
            key_and_last_rows=key_and_last_rows,
            past_end=is_past_end,
            held=is_held,
            in_step=in_step or Memory(),
            _first={kept: first} if len(first) else {},
        )


def prompt_scores(of_tokens: torch.Tensor, prompts: PromptRows) -> torch.Tensor:
    """Scores [requests, width] from one per row of the layout: what a scorer would return."""
    return of_tokens[prompts.table]


def text_mask(plan: StepPlan, device: torch.device) -> torch.Tensor:
    """bool [candidates]: all but the visual tokens decided about in this step."""
    mask = np.full(plan.candidates.num_tokens, True)
    for prefill in plan.prefills:
        own = mask[prefill.start : prefill.start + prefill.num_tokens]
        np.logical_not(prefill.ranked, out=own)
    return to_device(mask, device)
