"""What both model runners need to plan a step of a routed model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_reroute.attention.step import RoutedStep
from vllm_reroute.attention.step_tables import RunnerLengths
from vllm_reroute.kv_cache.spec import StageSpec
from vllm_reroute.plan.batch_routing import BatchRouting
from vllm_reroute.plan.planning import plan_step
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.step_plan import Places
from vllm_reroute.plan.visual_spans import VisualSpans

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.sampling_params import SamplingParams
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_reroute.routing.decoder import RoutedDecoder


class StepPlanner:
    """Plans steps and fills the tables of the decoder's attention layers."""

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, decoder: RoutedDecoder
    ) -> None:
        self.schedule = decoder.schedule
        self.tables = decoder.tables
        self.offers_parked = bool(vllm_config.cache_config.enable_prefix_caching)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        stages = {s.stage: i for i, s in enumerate(specs) if isinstance(s, StageSpec)}
        self.groups = [stages[stage] for stage in range(len(self.schedule.stages))]
        self.block_size = specs[self.groups[0]].block_size
        self._batch: tuple[list[Any], BatchRouting] = [], BatchRouting.of((), 0)

    def request_routing(
        self,
        mm_features: Sequence[MultiModalFeatureSpec],
        prompt: Sequence[int] | None,
        sampling_params: SamplingParams | None,
    ) -> RequestRouting | None:
        """The lasting facts of a request; None where it has no visual tokens.

        prompt: without generated tokens, also for a request that goes on after a preemption.
        """
        return RequestRouting.of(
            VisualSpans.of(mm_features),
            prompt,
            self.schedule,
            self.block_size,
            getattr(sampling_params, "extra_args", None),
        )

    def plan(
        self,
        requests: list[Any],
        routing_of: Callable[[Any], RequestRouting | None],
        num_computed: np.ndarray,
        num_scheduled: np.ndarray,
        block_tables: Sequence[torch.Tensor] | None,
        *,
        num_reqs: int,
        num_tokens: int,
        positions_of: Callable[[Places], torch.Tensor],
        lengths: RunnerLengths | None = None,
    ) -> RoutedStep:
        """Plan one step and fill the tables for it.

        requests: the batch, in order, as objects that live as long as their requests; routing_of: the
        lasting facts of one of them. num_computed, num_scheduled: [requests]. block_tables: one per
        K/V group, of at least num_reqs rows; None where the runner's are those to be filled. num_reqs,
        num_tokens: of the step with the runner's padding. positions_of: rope positions [n] or [3, n]
        of tokens, on the device. lengths: the runner's, of num_reqs rows.
        """
        plan = plan_step(
            num_computed.astype(np.int64),
            num_scheduled.astype(np.int64),
            self._batch_of(requests, routing_of),
            dense_stages=int(self.schedule.encoder_ratio is None),
            block_size=self.block_size,
            offers_parked=self.offers_parked,
        )
        self.tables.fill(
            plan,
            None if block_tables is None else [block_tables[group] for group in self.groups],
            num_reqs=num_reqs,
            num_tokens=num_tokens,
            lengths=lengths,
        )
        fetched = None if plan.boundary is None else plan.boundary.fetched
        return RoutedStep(plan, positions_of(fetched) if fetched else None)

    def _batch_of(
        self, requests: list[Any], routing_of: Callable[[Any], RequestRouting | None]
    ) -> BatchRouting:
        """Made anew only where the batch has changed."""
        before, batch = self._batch
        if len(before) != len(requests) or not all(map(is_, before, requests)):
            batch = BatchRouting.of([routing_of(r) for r in requests], len(self.schedule.stages))
            self._batch = requests, batch
        return batch
