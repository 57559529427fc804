"""The loop over stages: run, park, score, choose, run the chosen tokens, bring the others back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationMode, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.sequence import IntermediateTensors

from vllm_reroute.attention.layer import route_attention
from vllm_reroute.attention.metadata import StageMetadata, of_layers, reading
from vllm_reroute.attention.parked import ParkedExchange, ParkedStates
from vllm_reroute.plan.capacity import candidate_capacity
from vllm_reroute.plan.step_plan import StepPlan
from vllm_reroute.resolved import device_of, dtype_of
from vllm_reroute.routing.deferred_buffer import DeferredTokenBuffer
from vllm_reroute.routing.fused import FusedNorm
from vllm_reroute.routing.graphs import StageHandover, without_graphs
from vllm_reroute.routing.held_tokens import HeldTokens
from vllm_reroute.routing.prompt_rows import prompt_scores
from vllm_reroute.routing.scorers import Scorer, ScoringLayer
from vllm_reroute.routing.scorers.attention import LAST_TOKEN, ScoringRule
from vllm_reroute.routing.scorers.scorer import check_scores
from vllm_reroute.routing.stage import RunsStage, build_stage
from vllm_reroute.routing.step_decisions import HostDecisions, StepDecisions
from vllm_reroute.routing.token_state import TokenState
from vllm_reroute.schedule import RoutingSchedule, Stage
from vllm_reroute.schedule.published import SCORERS


class RoutedDecoder(nn.Module):
    """Runs a decoder vLLM has built, stage by stage.

    layers: the decoder's layers, called as `layer(positions, hidden, residual)`. norm: its final
    norm. scoring: the rows its decisions are scored by. A step in which every token runs all stages
    is an ordinary loop over all layers.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        norm: nn.Module,
        vllm_config: VllmConfig,
        scoring: ScoringRule = LAST_TOKEN,
    ) -> None:
        super().__init__()
        self.schedule = schedule = RoutingSchedule.of(vllm_config)
        scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
        hidden_size = model.hf_text_config.hidden_size
        attentions: list[Attention] = [layer.self_attn.attn for layer in layers]
        # One more column for what the vision encoder decided, where it takes the first decision.
        parked_width = hidden_size + (schedule.encoder_ratio is not None)
        stem = attentions[0].layer_name.rsplit(".layers.", 1)[0]
        parked_name = f"{stem}.layers.{len(layers)}.parked"
        parked = ParkedStates(attentions[0], parked_name, parked_width, vllm_config)
        self.tables = route_attention(attentions, schedule)
        self.held_tokens = self._held_tokens(attentions)
        self._config = vllm_config
        self._is_compiled = vllm_config.compilation_config.mode != CompilationMode.NONE
        self._hand_over = StageHandover(vllm_config, hidden_size)
        self._decided: HostDecisions | None = None
        # In tuples: these modules belong to the language model and load their weights there.
        self._parked = (parked,)
        self._norm = FusedNorm(norm)
        self._names = tuple(attention.layer_name for attention in attentions)
        self._runs = tuple(
            build_stage(layers[piece.first_layer : piece.end_layer], piece, vllm_config)
            for piece in schedule.pieces
        )
        self._scorers: dict[int, Scorer] = {
            at: SCORERS[schedule.scorer](
                ScoringLayer(
                    number=at,
                    layer=layers[at],
                    rule=scoring,
                    most_rows=scheduler.max_num_batched_tokens,
                )
            )
            for decision in schedule.decisions
            if (at := decision.scored_at) is not None
        }
        self.waiting = (
            DeferredTokenBuffer(
                candidate_capacity(scheduler.max_num_batched_tokens, model.max_model_len),
                hidden_size,
                dtype_of(vllm_config),
                device_of(vllm_config),
            )
            if schedule.reroutes
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
        if plan is None or plan.boundary is None:
            return self._run_all(hidden_states, positions, additions)
        with without_graphs():
            return self._run_routed(hidden_states, positions, additions, encoder_scores, plan)

    def _held_tokens(self, attentions: Sequence[Any]) -> HeldTokens | None:
        """None where no request can bring anything back."""
        if not self.schedule.marker or not self.schedule.reroutes:
            return None
        return HeldTokens([attentions[stage.first_layer] for stage in self.schedule.stages])

    def take_decisions(self) -> HostDecisions | None:
        """What the last step decided; None where nothing was, or somebody has taken it already."""
        decided, self._decided = self._decided, None
        return decided

    def _current_plan(self) -> StepPlan | None:
        """The plan travels with the metadata of the step that is really running."""
        metadata = of_layers()
        if not metadata:
            # Before there is a K/V pool: vLLM measures what the model takes.
            self.tables.reserve(self._config, self._parked[0].num_pages)
            return None
        own = metadata[self._names[0]]
        assert isinstance(own, StageMetadata), type(own)
        return own.plan

    def _run_all(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        additions: IntermediateTensors | None,
    ) -> torch.Tensor:
        first, *others = self._runs
        hidden_states, residual = first(positions, hidden_states, None, additions)
        for run in others:
            hidden_states, residual = self._hand_over(hidden_states, residual)
            hidden_states, residual = run(positions, hidden_states, residual)
        return self._final(hidden_states, residual)

    def _final(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """After the model's last norm; bit for bit as in stock vLLM where that compiles nothing."""
        if self._is_compiled:
            return self._norm.of_sum(hidden_states, residual)
        return self._norm.norm(hidden_states, residual)[0]

    def _run_routed(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        additions: IntermediateTensors | None,
        encoder_scores: torch.Tensor | None,
        plan: StepPlan,
    ) -> torch.Tensor:
        output = hidden_states.new_zeros(hidden_states.shape)
        num_tokens = plan.num_tokens
        positions = positions[..., :num_tokens]
        additions = None if additions is None else additions[:num_tokens]
        pieces = list(zip(self.schedule.pieces, self._runs, strict=True))
        stream = hidden_states[:num_tokens]
        if self.schedule.boundary > 0:
            (_, run), *pieces = pieces
            hidden, residual = run(positions, stream, None, additions)
            stream = hidden + residual
        exchange: ParkedExchange = of_layers()[self._parked[0].layer_name]
        tokens, scores = self._cross_boundary(stream, positions, encoder_scores, exchange, plan)
        if tokens is None:
            return output
        decisions = StepDecisions(plan)
        for piece, run in pieces:
            self._decide(tokens, piece.first_layer, scores, decisions)
            self._run(tokens, run, piece)
        self._decided = decisions.to_host() if plan.prefills else None
        rows = tokens.running.rows
        if exchange.source is not None:
            rows = exchange.source[tokens.running.rows]
        assert tokens.residual is not None, "the last stage has run"
        final = self._final(tokens.hidden, tokens.residual)
        if exchange.positions is None:
            return output.index_copy_(0, rows, final)
        # Rows of earlier steps' tokens all go to one more row, which is dropped.
        whole = torch.cat((output[:num_tokens], output.new_zeros(1, output.shape[1])))
        whole[rows.clamp(max=num_tokens)] = final
        output[:num_tokens] = whole[:num_tokens]
        return output

    def _cross_boundary(
        self,
        stream: torch.Tensor,
        positions: torch.Tensor,
        encoder_scores: torch.Tensor | None,
        exchange: ParkedExchange,
        plan: StepPlan,
    ) -> tuple[TokenState | None, torch.Tensor | None]:
        """Park what has to wait for a later step; collect the candidates of the first decision.

        stream: [tokens, hidden] at the first decision layer's input. Returns no state where nobody
        goes on, and the candidates' scores where the vision encoder gives them.
        """
        boundary, parked, hidden_size = plan.boundary, self._parked[0], stream.shape[1]
        assert boundary is not None, "without one, every token runs all stages"
        states = stream
        if encoder_scores is not None or parked.width > hidden_size:
            column = stream.new_zeros(len(stream)) if encoder_scores is None else encoder_scores
            states = torch.cat((stream, column[: len(stream), None].to(stream.dtype)), dim=1)
        if len(exchange.rows):
            parked.write(states[exchange.rows], exchange.written)
        num_candidates = plan.candidates.num_tokens
        if not num_candidates:
            return None, None
        if len(boundary.fetched):
            assert exchange.positions is not None, "what is fetched has positions"
            states = torch.cat((states, parked.read(exchange.read)))
            positions = torch.cat((positions, exchange.positions), dim=-1)
        if exchange.source is not None:
            states, positions = states[exchange.source], positions[..., exchange.source]
        candidates = states[:, :hidden_size]
        if self.waiting is not None:
            candidates = self.waiting.open(num_candidates).copy_(candidates)
        scores = states[:, hidden_size].float() if states.shape[1] > hidden_size else None
        return TokenState(plan, candidates, positions, self.held_tokens), scores

    def _decide(
        self,
        tokens: TokenState,
        layer: int,
        encoder_scores: torch.Tensor | None,
        decisions: StepDecisions,
    ) -> None:
        """Score and choose at a layer's input, where the schedule says so, and note the choice."""
        decision, scored = self.schedule.chosen_at.get(layer), self.schedule.scored_at.get(layer)
        if (decision is None and scored is None) or not tokens.plan.prefills:
            return
        tokens.merge()
        if scored is not None:
            self._score(tokens, self._scorers[layer], self.schedule.stage_of(scored.layer))
        if decision is not None:
            stage = self.schedule.stage_of(layer)
            if decision.scored_at is None:
                assert encoder_scores is not None, "images without the encoder's decision"
                tokens.scores = prompt_scores(encoder_scores, tokens.prompts(stage))
            choice = tokens.choose(stage, removes=decision.removes)
            decisions.add(choice, removes=decision.removes)

    def _score(self, tokens: TokenState, scorer: Scorer, stage: int) -> None:
        """Score the candidates for a stage, where there is something to choose."""
        if tokens.keeps_all(stage) and not scorer.accumulates:
            return
        prompts = tokens.prompts(stage)
        found = scorer.score(tokens.candidates.stream, tokens.candidates.positions, prompts)
        check_scores(found, prompts, scorer)
        if scorer.accumulates and tokens.scores is not None:
            found = tokens.scores + found
        tokens.scores = found

    def _run(self, tokens: TokenState, run: RunsStage, piece: Stage) -> None:
        """Run layers on the tokens chosen, some rows after the others where they are very many."""
        hidden, residual = tokens.hidden, tokens.residual
        if residual is None and piece.first_layer and self._is_compiled:
            # Compiled once, for a residual.
            hidden, residual = torch.zeros_like(hidden), hidden
        names = self._names[piece.first_layer : piece.end_layer]
        metadata: StageMetadata = of_layers()[names[0]]
        positions = tokens.running.positions
        if not metadata.pieces:
            tokens.hidden, tokens.residual = run(positions, hidden, residual)
            return
        # Later rows read the K/V of earlier ones.
        done = torch.empty_like(hidden), torch.empty_like(hidden)
        for rows, own in metadata.pieces:
            with reading(own, names):
                own_residual = None if residual is None else residual[rows]
                results = run(positions[..., rows], hidden[rows], own_residual)
            for whole, result in zip(done, results, strict=True):
                whole[rows] = result
        tokens.hidden, tokens.residual = done
