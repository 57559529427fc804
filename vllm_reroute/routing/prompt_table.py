"""Host arrays over the image prompts a step decides about: which row is where in the table of a decision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_reroute.plan.step_plan import ImagePrefill, Places, StageLengths, StepPlan


@dataclass(frozen=True)
class PromptTable:
    """Where a layout's rows are among all that is present of the prompts, cached tokens first.

    rows, last, table, keys: as in `PromptRows`, int64. cached, lens: [requests] int64, tokens cached and
    present. first_own: [requests] int64, the table's places of the prompts' first rows. num_visual: as
    in `PromptRows`.
    """

    rows: np.ndarray
    last: np.ndarray
    table: np.ndarray
    keys: np.ndarray
    cached: np.ndarray
    lens: np.ndarray
    first_own: np.ndarray
    num_visual: tuple[int, ...]

    @property
    def is_padded(self) -> bool:
        """Whether some prompts are shorter than others."""
        return len(self.table) > int(self.lens.sum())

    @classmethod
    def of(
        cls,
        prefills: tuple[ImagePrefill, ...],
        lengths: StageLengths,
        layout: int | None,
        stage: int,
    ) -> PromptTable:
        """lengths: of the layout, that of a stage, or None for all candidates. stage: whose K/V holds the
        cached tokens."""
        num_visual = tuple(p.turn.size if layout is None else p.turn.kept[layout] for p in prefills)
        cached = np.array([p.num_held(stage) for p in prefills], dtype=np.int64)
        own = np.array(
            [p.num_turn_rows - p.turn.size + n for p, n in zip(prefills, num_visual, strict=True)],
            dtype=np.int64,
        )
        starts = np.array([lengths.query_start_loc[p.index] for p in prefills], dtype=np.int64)
        lens, last = cached + own, starts + own - 1
        count, width, num_cached = len(prefills), int(lens.max()), int(cached.sum())
        if count == 1 and not num_cached:
            # Laid out as it is.
            places = np.arange(width)
            rows = starts[0] + places
            return cls(rows, last, rows, places, cached, lens, cached, num_visual)
        rows, first_places = ranges(starts, own), np.arange(count) * width
        own_places = ranges(first_places + cached, own)
        table, keys = last.repeat(width), np.zeros(count * width, dtype=np.int64)
        table[own_places] = rows
        keys[own_places] = np.arange(num_cached, num_cached + len(rows))
        if num_cached:
            keys[ranges(first_places, cached)] = np.arange(num_cached)
        return cls(rows, last, table, keys, cached, lens, first_places + cached, num_visual)


def hidden_keys(lens: np.ndarray, n: int) -> np.ndarray:
    """bool [requests, n, width]: keys that a prompt's last n tokens, in order, do not see.

    Each sees the keys up to its own; the last one sees all of the prompt's.
    """
    seen = (lens[:, None] - np.arange(n)[::-1]).clip(min=1)
    return np.arange(int(lens.max())) >= seen[..., None]


def shared_text(plan: StepPlan, lengths: StageLengths) -> tuple[Places, np.ndarray]:
    """Text that a prompt of this step may find cached though it is written in this very step.

    Its rows lead those of its request in every layout, so a row is its distance from the first.
    """
    assert plan.boundary is not None
    shared = plan.boundary.shared_text
    if not len(shared):
        return shared, shared.position
    rows = (
        lengths.query_start_loc[shared.request]
        + shared.position
        - plan.boundary.first[shared.request]
    )
    return shared, rows.astype(np.int64)


def earlier_turns(
    prefills: tuple[ImagePrefill, ...], stage: int, first_places: np.ndarray
) -> tuple[Places, np.ndarray]:
    """Entries [n] of a stage's K/V among which are visual tokens of earlier turns, of prompts that rank
    these, and [n] where the table of all prompts has the first visual token of each entry's prompt.

    first_places: [requests], where it has the prompts' first rows.
    """
    nothing = np.zeros(0, dtype=np.int64)
    if not any(prefill.num_recalled for prefill in prefills):
        return Places(nothing, nothing), nothing
    entries, of_prompt = [], []
    for number, prefill in enumerate(prefills):
        if prefill.num_recalled:
            for turn in prefill.routing.turns.turns:
                if turn.end <= prefill.first:
                    span = (prefill.routing.kv_length(stage, n) for n in (turn.begin, turn.end))
                    entries.append(np.arange(*span))
                    of_prompt += [number] * len(entries[-1])
    number_of = np.array(of_prompt, dtype=np.int64)
    batch_rows = np.array([p.index for p in prefills], dtype=np.int64)
    before = np.array([p.turn.begin - p.first for p in prefills], dtype=np.int64)
    places = Places(batch_rows[number_of], np.concatenate(entries))
    return places, (first_places + before)[number_of]


def first_of_each(counts: tuple[int, ...]) -> np.ndarray:
    """int64 [sum of counts]: the first entries of each row of a table [requests, largest count], laid out
    row behind row."""
    most = max(counts)
    return ranges(np.arange(len(counts)) * most, np.array(counts, dtype=np.int64))


def as_numbers(mask: np.ndarray) -> np.ndarray:
    """The bytes of a mask, and some more, as int64."""
    padded = np.zeros(-(-mask.size // 8) * 8, dtype=bool)
    padded[: mask.size] = mask.flat
    return padded.view(np.int64)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers start, start + 1, … of each range, one range after the other, int64."""
    if len(counts) == 1:
        return np.arange(starts[0], starts[0] + counts[0])
    ends = counts.cumsum()
    return np.arange(int(ends[-1]) if len(ends) else 0) + (starts - ends + counts).repeat(counts)
