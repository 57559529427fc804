"""The tokens of a step between its first decision and its end: who waits, who runs, where they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_reroute.plan.step_plan import StepPlan
from vllm_reroute.routing.prompt_rows import PromptRows, visual_mask
from vllm_reroute.routing.selection import select_rows


@dataclass
class Tokens:
    """Tokens in a layout.

    stream: [n, hidden], residual stream. positions: [n] or [3, n], original rope positions. rows:
    [n] int64, their places among the candidates of the first decision. visual: bool [n].
    """

    stream: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    visual: torch.Tensor

    def take(self, rows: torch.Tensor) -> Tokens:
        """The only gather: states, positions and places travel together."""
        return Tokens(
            self.stream[rows], self.positions[..., rows], self.rows[rows], self.visual[rows]
        )


@dataclass(frozen=True)
class Choice:
    """What one decision did, for whoever looks on.

    plan: of the step. stage: the stage it is for. candidates: who could be chosen, laid out as
    `prompts` says. scores: fp32 [requests, width]; None where there was nothing to decide. running:
    those that run the stage.
    """

    plan: StepPlan
    stage: int
    candidates: Tokens
    prompts: PromptRows
    scores: torch.Tensor | None
    running: Tokens


class TokenState:
    """Moves a step's tokens through its decisions.

    candidates: who can be chosen at the next decision. chosen: those of them that run now, None for
    all. hidden, residual: of those that run, as decoder layers hand them on; residual is None where
    nothing has run since the last decision. prompts: the image prompts among the candidates; None where
    this step decides about none.
    """

    def __init__(self, plan: StepPlan, stream: torch.Tensor, positions: torch.Tensor) -> None:
        """stream: [candidates, hidden] at the input of the first decision layer; written in place.

        positions: [candidates] or [3, candidates].
        """
        device = stream.device
        self.plan = plan
        self.candidates = Tokens(
            stream=stream,
            positions=positions,
            rows=torch.arange(len(stream), device=device),
            visual=visual_mask(plan, device),
        )
        self.chosen: torch.Tensor | None = None
        self.running = self.candidates
        self.hidden, self.residual = stream, None
        self.scores: torch.Tensor | None = None
        self.prompts = PromptRows.of(plan, None, device) if plan.prefills else None

    def merge(self) -> None:
        """Bring the residual stream of all candidates to the layer reached.

        Those that ran rejoin the others, which waited unchanged.
        """
        if self.residual is None:
            return
        if self.chosen is None:
            torch.add(self.hidden, self.residual, out=self.candidates.stream)
        else:
            self.candidates.stream.index_copy_(0, self.chosen, self.hidden + self.residual)

    def keeps_all(self, stage: int) -> bool:
        """Whether a decision for `stage` has nothing to decide: as many are kept as there are."""
        return self._num_kept(stage) == self.prompts.num_visual

    def choose(self, stage: int, *, removes: bool) -> Choice:
        """Let the best of the candidates run `stage`. removes: the others are gone for good."""
        candidates, prompts, scores = self.candidates, self.prompts, None
        if self.keeps_all(stage):
            self.running, self.chosen = self.candidates, None
        else:
            scores = self.scores
            self.chosen = select_rows(
                self.scores,
                self.candidates.visual,
                self.prompts,
                self._num_kept(stage),
                self.plan.stages[stage].num_tokens,
            )
            self.running = self.candidates.take(self.chosen)
        self.hidden, self.residual = self.running.stream, None
        if removes:
            self.candidates, self.chosen = self.running, None
            self.prompts = PromptRows.of(self.plan, stage, self.running.rows.device)
        return Choice(self.plan, stage, candidates, prompts, scores, self.running)

    def _num_kept(self, stage: int) -> tuple[int, ...]:
        """Visual tokens to keep, per image prompt of the step."""
        return tuple(prefill.routing.kept[stage] for prefill in self.plan.prefills)
