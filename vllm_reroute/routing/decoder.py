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
from vllm_reroute.config import RoutingSchedule
from vllm_reroute.planning.step_plan import StepPlan
from vllm_reroute.routing.deferred_buffer import DeferredTokenBuffer
from vllm_reroute.routing.prompt_rows import PromptRows, visual_mask
from vllm_reroute.routing.scoring import LastTokenScorer
from vllm_reroute.routing.selection import select_rows
from vllm_reroute.routing.stage import build_stage


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
    norm. A step without image prefills is an ordinary loop over all layers.
    """

    def __init__(
        self, layers: Sequence[nn.Module], norm: nn.Module, vllm_config: VllmConfig
    ) -> None:
        super().__init__()
        self.schedule = RoutingSchedule.of(vllm_config)
        self.routing_step = RoutingStep()
        route_attention(
            [layer.self_attn.attn for layer in layers], self.schedule, self.routing_step
        )
        self._first_attention: RoutedAttention = layers[0].self_attn.attn
        # In tuples: these modules belong to the language model and load their weights there.
        self._stages = tuple(
            build_stage(layers[stage.first_layer : stage.end_layer], stage, vllm_config)
            for stage in self.schedule.stages
        )
        self._scorers = tuple(LastTokenScorer(layers[first]) for first in self.schedule.layers)
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

    def take_key_weights(self) -> None:
        """Call once the decoder's weights have been loaded, before vLLM processes them."""
        for scorer in self._scorers:
            scorer.take_key_weights()

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        additions: IntermediateTensors | None = None,
    ) -> torch.Tensor:
        """Final hidden states [tokens, hidden] of all tokens of the step, padding included.

        hidden_states: [tokens, hidden], the embeddings. positions: [tokens] or [3, tokens].
        additions: [tokens, hidden] tensors to add after the first layers, one each. Rows of tokens
        that did not run the last stage hold zeros: nothing samples from them.
        """
        plan = self._current_plan()
        if plan is None or not plan.prefills:
            return self._run_all(hidden_states, positions, additions)
        return self._run_routed(hidden_states, positions, additions, plan)

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
        first, *others = self._stages
        hidden_states, residual = first(positions, hidden_states, None, additions)
        for stage in others:
            hidden_states, residual = stage(positions, hidden_states, residual)
        return self._norm[0](hidden_states, residual)[0]

    def _run_routed(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        additions: IntermediateTensors | None,
        plan: StepPlan,
    ) -> torch.Tensor:
        device, num_tokens = hidden_states.device, plan.num_tokens
        positions = positions[..., :num_tokens]
        if additions is not None:
            additions = additions[:num_tokens]
        hidden, residual = self._stages[0](positions, hidden_states[:num_tokens], None, additions)
        tokens = RunningTokens(
            stream=self._merged(hidden, residual),
            positions=positions,
            rows=torch.arange(num_tokens, device=device),
            visual=visual_mask(plan, device),
        )
        everyone = tokens
        prompts = PromptRows.of(plan, 1.0, 0, device)
        for i, scorer in enumerate(self._scorers):
            ratio = self.schedule.keep[i]
            ratio_index = self.schedule.ratios.index(ratio)
            scores = scorer.score(tokens.stream, tokens.positions, prompts)
            rows = select_rows(
                scores,
                tokens.visual,
                prompts,
                [p.routing.num_kept(ratio_index) for p in plan.prefills],
                plan.lengths[ratio].num_tokens,
            )
            running = tokens.take(rows)
            hidden, residual = self._stages[i + 1](
                running.positions, torch.zeros_like(running.stream), running.stream
            )
            if i + 1 == len(self._scorers):
                break
            if self.deferred is not None:
                self.deferred.write(running.rows, hidden + residual)
                tokens = everyone
            else:
                running.stream = hidden + residual
                tokens = running
                prompts = PromptRows.of(plan, ratio, ratio_index, device)
        output = hidden_states.new_zeros(hidden_states.shape)
        return output.index_copy_(0, running.rows, self._norm[0](hidden, residual)[0])

    def _merged(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The residual stream after stage 0: in the side buffer if tokens may come back."""
        if self.deferred is None:
            return hidden + residual
        return torch.add(hidden, residual, out=self.deferred.open(len(hidden)))
