"""What the decisions of one step chose: gathered on the device, read on the host once it is there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_reroute.plan.decided_turn import DecidedTurn, brought_back
from vllm_reroute.plan.step_plan import ImagePrefill, StepPlan
from vllm_reroute.routing.token_state import Choice
from vllm_reroute.schedule.request_options import SCORES


@dataclass(frozen=True)
class _Decision:
    """One decision: for which stage, among whom, by what.

    among: number of the decision whose kept tokens were its candidates; None for all of the step's.
    scored: per prompt, where its candidates' scores are in its row of them; None where nobody wants
    to be told scores, or there are none.
    """

    stage: int
    among: int | None
    scored: tuple[slice, ...] | None


class StepDecisions:
    """The decisions of a step, in order."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan
        self._wants_scores = any(p.routing.explain == SCORES for p in plan.prefills)
        self._decisions: list[_Decision] = []
        self._rows: list[torch.Tensor] = []
        self._scores: list[torch.Tensor] = []
        self._among: int | None = None

    def add(self, choice: Choice, *, removes: bool) -> None:
        """Note what was chosen. removes: whether only that can be chosen from now on."""
        self._rows.append(choice.running.rows)
        scored = None
        if self._wants_scores and choice.scores is not None:
            held = choice.prompts.held
            scores = choice.scores if held is None else choice.scores.masked_fill(held, torch.nan)
            self._scores.append(scores)
            scored = tuple(map(slice, choice.prompts.num_cached, choice.prompts.lens))
        self._decisions.append(_Decision(choice.stage, self._among, scored))
        if removes:
            self._among = len(self._decisions) - 1

    def to_host(self) -> HostDecisions:
        """Begin to copy, behind the work that is under way; nothing waits for it."""
        rows = torch.cat(self._rows)
        counts = [len(own) for own in self._rows]
        copied = None
        # Copies that do not block go to pinned memory.
        host = [part.to("cpu", non_blocking=True) for part in (rows, *self._scores)]
        if rows.device.type != "cpu":
            copied = torch.Event(device=rows.device.type)
            copied.record()
        return HostDecisions(self.plan, self._decisions, counts, host, copied)


class HostDecisions:
    """The same, on its way to the host."""

    def __init__(
        self,
        plan: StepPlan,
        decisions: list[_Decision],
        counts: list[int],
        host: list[torch.Tensor],
        copied: torch.Event | None,
    ) -> None:
        """host: rows of candidates that run, `counts` of each decision; then scores [requests, width] of
        decisions that have any. copied: when all of it is there; None if it is."""
        self._plan, self._decisions, self._counts, self._copied = plan, decisions, counts, copied
        self._rows, *self._scores = host

    def turns(self) -> dict[int, DecidedTurn]:
        """By the request's row in the step's batch. Waits until the copies are there."""
        if self._copied is not None:
            self._copied.synchronize()
        kept = np.zeros((len(self._decisions), self._plan.candidates.num_tokens), dtype=bool)
        for of_decision, rows in zip(kept, self._rows.split(self._counts), strict=True):
            of_decision[rows.numpy()] = True
        scores = [part.numpy() for part in self._scores]
        return {
            prefill.index: self._turn(number, prefill, kept, scores)
            for number, prefill in enumerate(self._plan.prefills)
        }

    def _turn(
        self, number: int, prefill: ImagePrefill, kept: np.ndarray, scores: list[np.ndarray]
    ) -> DecidedTurn:
        # What follows the turn in the same step is not decided about.
        rows = slice(prefill.start, prefill.start + prefill.num_turn_rows)
        visual = prefill.ranked[: prefill.num_turn_rows]
        kept = kept[:, rows]
        by_stage = np.ones((len(self._plan.stages), prefill.turn.size), dtype=bool)
        by_stage[[d.stage for d in self._decisions]] = kept[:, visual]
        runs = by_stage.T
        told = None
        if prefill.routing.explain:
            told = np.ascontiguousarray(runs)
        if prefill.routing.explain == SCORES:
            ranked = np.full(runs.shape, np.nan, dtype=np.float32)
            ranks = iter(scores)
            for decision in self._decisions:
                if decision.scored is not None:
                    of_rows = next(ranks)[number, decision.scored[number]]
                    here = np.ones_like(visual) if decision.among is None else kept[decision.among]
                    ranked[here[visual], decision.stage] = of_rows[visual[here]]
            told = np.stack((runs.astype(np.float32), ranked), axis=-1)
        came = (
            prefill.turn.kept if prefill.turn.recalls else brought_back(runs).sum(axis=0).tolist()
        )
        return DecidedTurn(
            end=prefill.turn.end,
            brought_back=tuple(came),
            told=told,
            ranks_earlier=prefill.turn.recalls,
        )
