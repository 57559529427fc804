"""What a worker tells the scheduler, once a turn has been decided.

It travels in `ModelRunnerOutput.aux_output_connector_output`, vLLM's field for what else a step
leaves per request. What fills it in vLLM is the routing of experts, which no routed model has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vllm.v1.outputs import ModelRunnerOutput


@dataclass(frozen=True, kw_only=True)
class DecidedTurn:
    """The outcome of all decisions on one turn of a request.

    end: the turn's, see `Turn`. brought_back: [stages], visual tokens that run a stage although an
    earlier one, or that stage in an earlier turn, has deferred them. told: what the request asked to be
    told, None if it did not: bool [visual tokens of the turn, stages], which of them run; where it wants
    scores, too, fp32 [visual tokens, stages, 2], 1 or 0 for that and what the stage's decision ranked it
    by, NaN where it was no candidate or nothing was ranked. ranks_earlier: whether these are the visual
    tokens of all earlier turns.
    """

    end: int
    brought_back: tuple[int, ...]
    told: np.ndarray | None
    ranks_earlier: bool = False


def send(output: ModelRunnerOutput, turns: Mapping[str, DecidedTurn]) -> None:
    """Let what a step has decided, by request id, travel with its output."""
    carried: dict[str, Any] = dict(turns)
    output.aux_output_connector_output = carried


def turns_of(output: ModelRunnerOutput) -> Mapping[str, DecidedTurn]:
    """By request id; none of a step that has decided nothing."""
    carried: Mapping[str, Any] = output.aux_output_connector_output or {}
    return carried


def num_brought_back(runs: np.ndarray) -> list[int]:
    """[stages]: how many tokens run a stage although an earlier one has deferred them.

    runs: bool [stages, tokens], who runs.
    """
    counts, everywhere = [0], runs[0].copy()
    for own in runs[1:]:
        counts.append(int(np.count_nonzero(own > everywhere)))
        everywhere &= own
    return counts


def together(before: np.ndarray, told: np.ndarray) -> np.ndarray:
    """What two turns tell of the same visual tokens: who runs by either, with the latest score.

    Either as in `DecidedTurn.told`.
    """
    if told.dtype == bool:
        return before | told
    runs = np.maximum(before[..., 0], told[..., 0])
    scores = np.where(np.isnan(told[..., 1]), before[..., 1], told[..., 1])
    return np.stack((runs, scores), axis=-1)
