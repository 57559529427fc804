"""What the decisions of one step chose: gathered on the device, read on the host once it is there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_reroute.plan.decided_turn import DecidedTurn, num_brought_back
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
        counts = [own.shape[0] for own in self._rows]
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
        return {
            prefill.index: DecidedTurn(
                end=prefill.turn.end,
                brought_back=self._num_back(prefill, kept),
                told=self._told(number, prefill, kept) if prefill.routing.explain else None,
                ranks_earlier=prefill.turn.recalls,
            )
            for number, prefill in enumerate(self._plan.prefills)
        }

    def _num_back(self, prefill: ImagePrefill, kept: np.ndarray) -> tuple[int, ...]:
        """[stages]. kept: bool [decisions, candidates]."""
        if prefill.turn.recalls:
            return prefill.turn.kept
        counts = [0] * len(self._plan.stages)
        # Text is never deferred, so it never comes back: all rows can be counted.
        own = kept[:, prefill.start : prefill.start + prefill.num_tokens]
        for decision, count in zip(self._decisions, num_brought_back(own), strict=True):
            counts[decision.stage] = count
        return tuple(counts)

    def _told(self, number: int, prefill: ImagePrefill, kept: np.ndarray) -> np.ndarray:
        """kept: bool [decisions, candidates]."""
        # What follows the turn in the same step is not decided about.
        visual = prefill.ranked[: prefill.num_turn_rows]
        kept = kept[:, prefill.start : prefill.start + prefill.num_turn_rows]
        runs = np.ones((prefill.turn.size, len(self._plan.stages)), dtype=bool)
        runs[:, [d.stage for d in self._decisions]] = kept[:, visual].T
        if prefill.routing.explain != SCORES:
            return runs
        ranked = np.full(runs.shape, np.nan, dtype=np.float32)
        scores = iter(self._scores)
        for decision in self._decisions:
            if decision.scored is not None:
                of_rows = next(scores)[number, decision.scored[number]].numpy()
                here = np.ones_like(visual) if decision.among is None else kept[decision.among]
                ranked[here[visual], decision.stage] = of_rows[visual[here]]
        return np.stack((runs.astype(np.float32), ranked), axis=-1)
