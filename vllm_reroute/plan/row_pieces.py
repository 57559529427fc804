"""A stage's rows in runs of bounded size, so that a step needs no more memory than vLLM profiled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_reroute.plan.step_plan import StageLengths, StepPlan


@dataclass(frozen=True)
class RowPiece:
    """Some rows of a stage, run after those of the pieces before.

    rows: [n] int64, among the stage's rows, request by request. lengths: what these rows see.
    """

    rows: np.ndarray
    lengths: StageLengths


def row_pieces(plan: StepPlan, stage: int, most: int) -> tuple[RowPiece, ...]:
    """Cut a stage's rows into pieces of at most `most`; none where all of them run at once.

    Text that other requests may read through shared blocks comes before everything else, in the
    order in which requests begin: whoever reads what another request writes in this very step
    begins behind it.
    """
    lengths, boundary = plan.stages[stage], plan.boundary
    if boundary is None or lengths.num_tokens <= most:
        return ()
    text_rows = boundary.text_rows
    runs = [(int(i), 0, int(text_rows[i])) for i in np.argsort(boundary.first, kind="stable")]
    runs += [(i, int(text_rows[i]), int(n)) for i, n in enumerate(lengths.query_lens)]
    return tuple(_piece(lengths, piece) for piece in _packed(runs, most))


def _packed(runs: list[tuple[int, int, int]], most: int) -> list[list[tuple[int, int, int]]]:
    """Fill pieces with runs (request, begin, end), in order, cutting where one is full.

    A request appears once in a piece: its rows there are one run.
    """
    pieces: list[list[tuple[int, int, int]]] = []
    room, inside = 0, set[int]()
    for request, begin, end in runs:
        while begin < end:
            if not room or request in inside:
                pieces.append([])
                room, inside = most, set()
            taken = min(room, end - begin)
            pieces[-1].append((request, begin, begin + taken))
            inside.add(request)
            begin, room = begin + taken, room - taken
    return pieces


def _piece(lengths: StageLengths, runs: list[tuple[int, int, int]]) -> RowPiece:
    query_lens = np.zeros_like(lengths.query_lens)
    seq_lens = lengths.seq_lens - lengths.query_lens
    rows = []
    for request, begin, end in sorted(runs):
        query_lens[request] = end - begin
        seq_lens[request] += end
        rows.append(np.arange(begin, end) + lengths.query_start_loc[request])
    seq_lens[query_lens == 0] = 0
    return RowPiece(np.concatenate(rows).astype(np.int64), StageLengths(query_lens, seq_lens))
