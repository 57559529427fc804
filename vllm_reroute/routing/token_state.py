"""The tokens of a step between its first decision and its end: who waits, who runs, where they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_reroute.plan.step_plan import StepPlan
from vllm_reroute.routing.held_tokens import HeldTokens, numbers_of
from vllm_reroute.routing.prompt_rows import Memory, PromptRows, text_mask
from vllm_reroute.routing.selection import select_rows


class Tokens:
    """Tokens in a layout.

    stream: [n, hidden], residual stream. positions: [n] or [3, n], original rope positions.
    """

    def __init__(
        self,
        stream: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor | None,
        text: torch.Tensor,
        taken: torch.Tensor | None = None,
    ) -> None:
        """rows, text: of the tokens of which `taken` are these; None where they are all of them.

        No rows: those tokens are all the candidates of the first decision.
        """
        self.stream, self.positions = stream, positions
        self._rows, self._text, self._taken = rows, text, taken

    @cached_property
    def rows(self) -> torch.Tensor:
        """[n] int64, their places among the candidates of the first decision."""
        if self._taken is None:
            assert self._rows is None, "all of some are those"
            return torch.arange(len(self.stream), device=self.stream.device)
        return self._taken if self._rows is None else self._rows[self._taken]

    @cached_property
    def text(self) -> torch.Tensor:
        """bool [n], whether nobody decides about them."""
        return self._text if self._taken is None else self._text[self._taken]

    @property
    def visual(self) -> torch.Tensor:
        """bool [n], whether they are what is decided about."""
        return ~self.text

    def take(self, rows: torch.Tensor) -> Tokens:
        """The only gather: states and positions travel together, the rest when it is asked for."""
        is_everyone = self._rows is None and self._taken is None
        of = None if is_everyone else self.rows
        stream, positions = self.stream.index_select(0, rows), self.positions.index_select(-1, rows)
        return Tokens(stream, positions, of, self.text, taken=rows)


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
    nothing has run since the last decision.
    """

    def __init__(
        self,
        plan: StepPlan,
        stream: torch.Tensor,
        positions: torch.Tensor,
        held: HeldTokens | None = None,
    ) -> None:
        """stream: [candidates, hidden] at the input of the first decision layer; written in place.

        positions: [candidates] or [3, candidates]. held: what stages hold, where turns are kept.
        """
        device = stream.device
        self.plan = plan
        self.candidates = Tokens(
            stream=stream,
            positions=positions,
            rows=None,
            text=text_mask(plan, device),
        )
        self.chosen: torch.Tensor | None = None
        self.running = self.candidates
        self.hidden = stream
        self.residual: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None
        self._prompts: dict[int, PromptRows] = {}
        self._in_step: dict[int, Memory] = {}
        self._held = held
        self._layout: int | None = None
        self._kept: dict[int, tuple[int, ...]] = {}
        # What is cached before a prompt's first turn is text, the same in every stage.
        self._stages_differ = any(prefill.is_later_turn for prefill in plan.prefills)

    def prompts(self, stage: int) -> PromptRows:
        """The image prompts among the candidates, as a decision for `stage` sees them."""
        key = stage if self._stages_differ else 0
        if key not in self._prompts:
            device = self.candidates.stream.device
            in_step = self._in_step.setdefault(key, Memory())
            self._prompts[key] = PromptRows.of(
                self.plan,
                self._layout,
                device,
                stage,
                of=key,
                in_step=in_step,
                held=self._held,
            )
        return self._prompts[key]

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
        return self._num_kept(stage) == self.prompts(stage).num_visual

    def choose(self, stage: int, *, removes: bool) -> Choice:
        """Let the best of the candidates run `stage`. removes: the others are gone for good."""
        candidates, prompts, scores = self.candidates, self.prompts(stage), None
        if self.keeps_all(stage):
            self.running, self.chosen = self.candidates, None
        else:
            scores = self.scores
            assert scores is not None, "what is decided about has been scored"
            self.chosen = select_rows(
                scores,
                self.candidates.text,
                prompts,
                self._num_kept(stage),
                self.plan.stages[stage].num_tokens,
            )
            self.running = self.candidates.take(self.chosen)
        self.hidden, self.residual = self.running.stream, None
        if self._held is not None:
            self._held.write(stage, self.plan, self._numbers[self.running.rows])
        if removes:
            self.candidates, self.chosen = self.running, None
            self._prompts, self._layout = {}, stage
        return Choice(self.plan, stage, candidates, prompts, scores, self.running)

    @cached_property
    def _numbers(self) -> torch.Tensor:
        return numbers_of(self.plan, self.candidates.stream.device)

    def _num_kept(self, stage: int) -> tuple[int, ...]:
        """Visual tokens to keep, per image prompt of the step."""
        if stage not in self._kept:
            self._kept[stage] = tuple(p.turn.kept[stage] for p in self.plan.prefills)
        return self._kept[stage]
