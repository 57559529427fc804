"""The loop over stages: score, choose, run the chosen tokens, bring the others back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.sequence import IntermediateTensors

from vllm_reroute.attention.layer import RoutedAttention, RoutingStep, route_attention
from vllm_reroute.attention.metadata import RoutedAttentionMetadata
from vllm_reroute.plan.step_plan import StepPlan
from vllm_reroute.routing.deferred_buffer import DeferredTokenBuffer
from vllm_reroute.routing.prompt_rows import PromptRows, prompt_scores, visual_mask
from vllm_reroute.routing.scorers.attention import LAST_TOKEN, LastTokenScorer, ScoringRule
from vllm_reroute.routing.scorers.random import RandomScorer
from vllm_reroute.routing.selection import select_rows
from vllm_reroute.routing.stage import build_stage
from vllm_reroute.schedule import RoutingSchedule
from vllm_reroute.schedule.routing_schedule import Decision


@dataclass
class RunningTokens:
    """The tokens a stage runs on.

    stream: [n, hidden], residual stream. positions: [n] or [3, n], original rope positions.
    rows: [n] int64, their places among all tokens of the step. visual: bool [n].
    """

    stream: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    visual: torch.Tensor

    def take(self, rows: torch.Tensor) -> RunningTokens:
        """The only gather: states, positions and places travel together."""
        return RunningTokens(
            self.stream[rows], self.positions[..., rows], self.rows[rows], self.visual[rows]
        )


class RoutedDecoder(nn.Module):
    """Runs a decoder vLLM has built, stage by stage.

    layers: the decoder's layers, called as `layer(positions, hidden, residual)`. norm: its final
    norm. scoring: the rows its decisions are scored by. A step without image prefills is an
    ordinary loop over all layers.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        vllm_config: VllmConfig,
        scoring: ScoringRule = LAST_TOKEN,
    ) -> None:
        super().__init__()
        self.schedule = RoutingSchedule.of(vllm_config)
        self.routing_step = RoutingStep()
        route_attention(
            [layer.self_attn.attn for layer in layers], self.schedule, self.routing_step
        )
        self._first_attention: RoutedAttention = layers[0].self_attn.attn
        # In tuples: these modules belong to the language model and load their weights there.
        self._pieces = tuple(
            build_stage(layers[piece.first_layer : piece.end_layer], piece, vllm_config)
            for piece in self.schedule.pieces
        )
        self._scorers = {
            decision.scored_at: RandomScorer(decision.scored_at)
            if self.schedule.scorer == "random"
            else LastTokenScorer(layers[decision.scored_at], scoring)
            for decision in self.schedule.decisions
            if decision.scored_at is not None
        }
        self._norm = (norm,)
        text_config = vllm_config.model_config.hf_text_config
        self.deferred = (
            DeferredTokenBuffer(
                vllm_config.scheduler_config.max_num_batched_tokens,
                text_config.hidden_size,
                vllm_config.model_config.dtype,
                vllm_config.device_config.device,
            )
            if self.schedule.reroutes
            else None
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        additions: IntermediateTensors | None = None,
        encoder_scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Final hidden states [tokens, hidden] of all tokens of the step, padding included.

        hidden_states: [tokens, hidden], the embeddings. positions: [tokens] or [3, tokens].
        additions: [tokens, hidden] tensors to add after the first layers, one each.
        encoder_scores: [tokens] fp32, where the vision encoder takes the first decision. Rows of
        tokens that did not run the last stage hold zeros: nothing samples from them.
        """
        plan = self._current_plan()
        if plan is None or not plan.prefills:
            return self._run_all(hidden_states, positions, additions)
        return self._run_routed(hidden_states, positions, additions, encoder_scores, plan)

    def _current_plan(self) -> StepPlan | None:
        """The plan travels with the metadata of the step that is really running."""
        metadata = get_forward_context().attn_metadata
        if not metadata:
            return None
        own = metadata[self._first_attention.layer_name]
        assert isinstance(own, RoutedAttentionMetadata), type(own)
        return own.plan

    def _run_all(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        additions: IntermediateTensors | None,
    ) -> torch.Tensor:
        first, *others = self._pieces
        hidden_states, residual = first(positions, hidden_states, None, additions)
        for piece in others:
            hidden_states, residual = piece(positions, hidden_states, residual)
        return self._norm[0](hidden_states, residual)[0]

    def _run_routed(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        additions: IntermediateTensors | None,
        encoder_scores: torch.Tensor | None,
        plan: StepPlan,
    ) -> torch.Tensor:
        device, num_tokens = hidden_states.device, plan.num_tokens
        if additions is not None:
            additions = additions[:num_tokens]
        # Candidates of the next decision, and those of them that run: rows `chosen`, None for all.
        candidates = RunningTokens(
            stream=hidden_states[:num_tokens],
            positions=positions[..., :num_tokens],
            rows=torch.arange(num_tokens, device=device),
            visual=visual_mask(plan, device),
        )
        running, chosen = candidates, None
        prompts = PromptRows.of(plan, None, device)
        decisions = {decision.layer: decision for decision in self.schedule.decisions}
        scored = {decision.scored_at: decision for decision in self.schedule.decisions}
        hidden, residual, scores = candidates.stream, None, None
        accumulates = self.schedule.scorer == "accumulated"
        for piece, run in zip(self.schedule.pieces, self._pieces, strict=True):
            layer = piece.first_layer
            if layer in decisions or layer in scored:
                candidates.stream = self._brought_back(hidden, residual, chosen, candidates)
            if layer in scored and (accumulates or not _keeps_all(scored[layer], prompts, plan)):
                found = self._scorers[layer].score(candidates.stream, candidates.positions, prompts)
                scores = scores + found if accumulates and scores is not None else found
            if layer in decisions:
                decision = decisions[layer]
                if decision.scored_at is None:
                    assert encoder_scores is not None, "images without the encoder's decision"
                    scores = prompt_scores(encoder_scores, prompts)
                running, chosen = self._choose(decision, scores, candidates, prompts, plan)
                if decision.removes:
                    candidates, chosen = running, None
                    prompts = PromptRows.of(plan, decision.keep_ratio, device)
            if layer == 0:
                hidden, residual = run(running.positions, running.stream, None, additions)
            else:
                hidden, residual = run(
                    running.positions, torch.zeros_like(running.stream), running.stream
                )
        output = hidden_states.new_zeros(hidden_states.shape)
        return output.index_copy_(0, running.rows, self._norm[0](hidden, residual)[0])

    def _choose(
        self,
        decision: Decision,
        scores: torch.Tensor | None,
        candidates: RunningTokens,
        prompts: PromptRows,
        plan: StepPlan,
    ) -> tuple[RunningTokens, torch.Tensor | None]:
        """Tokens that run from the decision's layer on, and their rows among the candidates.

        scores: fp32 [requests, width]; not read where nothing is deferred: all run, and the rows
        are None.
        """
        if _keeps_all(decision, prompts, plan):
            return candidates, None
        rows = select_rows(
            scores,
            candidates.visual,
            prompts,
            _num_kept(decision, plan),
            plan.lengths[decision.keep_ratio].num_tokens,
        )
        return candidates.take(rows), rows

    def _brought_back(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        chosen: torch.Tensor | None,
        candidates: RunningTokens,
    ) -> torch.Tensor:
        """The residual stream of all candidates at a layer's input.

        hidden, residual: of those that ran, rows `chosen` of the candidates. The others waited in
        the side buffer, which holds the stream wherever tokens may come back.
        """
        if self.deferred is None:
            return hidden if residual is None else hidden + residual
        waiting = self.deferred.open(len(candidates.rows))
        if chosen is None and residual is not None:
            return torch.add(hidden, residual, out=waiting)
        if chosen is None:
            return waiting.copy_(hidden)
        self.deferred.write(chosen, hidden + residual)
        return waiting


def _num_kept(decision: Decision, plan: StepPlan) -> list[int]:
    """Visual tokens to keep, per image prompt of the step."""
    ratio_index = plan.ratio_index(decision.keep_ratio)
    return [prefill.routing.num_kept(ratio_index) for prefill in plan.prefills]


def _keeps_all(decision: Decision, prompts: PromptRows, plan: StepPlan) -> bool:
    """Whether there is nothing to decide: as many are kept as there are."""
    return _num_kept(decision, plan) == list(prompts.num_visual)
