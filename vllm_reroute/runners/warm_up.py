"""Runs every stage once before the first request, so that none pays for what happens only once.

That is compiling Triton kernels, loading libraries' kernels, and finding out how K is laid out in
pages. Nothing stays of it: slots are padding, so no K/V is written; nothing is parked; and blocks
that are read are the null block, which belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_reroute.attention.step import RoutedStep
from vllm_reroute.families.visual_tokens import visual_tokens_per_image
from vllm_reroute.logger import reroute_logger
from vllm_reroute.plan.chunks import LAST_TOKENS
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.step_plan import Places
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.resolved import dtype_of
from vllm_reroute.runners.step_planner import StepPlanner
from vllm_reroute.to_device import to_device

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.utils import AttentionGroup

logger = reroute_logger(__name__)

_TEXT_BEHIND = 8


class WarmUp:
    """Image prompts made up for the purpose: one in a single step, one whose last chunk decides."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        model: Any,
        attn_groups: Sequence[Sequence[AttentionGroup]],
        device: torch.device,
    ) -> None:
        """model: a routed model, with its pages in place."""
        self.config, self.model, self.device = vllm_config, model, device
        self.attn_groups = attn_groups
        self.planner = StepPlanner(vllm_config, kv_cache_config, model.routed_decoder)
        self.planner.offers_parked = False
        max_len = vllm_config.model_config.max_model_len
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self._tables = [
            torch.zeros(
                1, s.max_num_blocks_per_req(vllm_config, max_len), dtype=torch.int32, device=device
            )
            for s in specs
        ]

    @classmethod
    def of_runner(cls, runner: Any) -> WarmUp:
        """runner: a V1 model runner with its K/V pool in place."""
        return cls(
            runner.vllm_config,
            runner.kv_cache_config,
            runner.get_model(),
            runner.attn_groups,
            runner.device,
        )

    def run(self) -> None:
        """Does nothing where a step or a request may hold too few tokens for an image."""
        config, before = self.config, self.planner.block_size
        most = min(
            config.scheduler_config.max_num_batched_tokens, config.model_config.max_model_len
        )
        num_visual = visual_tokens_per_image(config.model_config.hf_config)
        marker = self.planner.schedule.marker
        behind = max(_TEXT_BEHIND, len(marker))
        num_visual = min(num_visual, most - before - behind)
        if num_visual < LAST_TOKENS:
            return
        num_prompt = before + num_visual + behind
        # Where turns end with a marker, this one ends with the prompt.
        other = max(marker, default=0) + 1
        routing = RequestRouting.of(
            VisualSpans((before,), (before + num_visual,)),
            [*[other] * (num_prompt - len(marker)), *marker],
            self.planner.schedule,
            self.planner.block_size,
        )
        assert routing is not None, "its prompt has visual tokens"
        # The second one reads back what waits in pages, and keys of text before the image.
        for computed in (0, before + num_visual // 2):
            self._step(routing, computed, num_prompt - computed)
            self.model.routed_decoder.take_decisions()
        logger.info("warmed up all stages with an image of %d visual tokens", num_visual)

    def _step(self, routing: RequestRouting, computed: int, scheduled: int) -> None:
        step = self.planner.plan(
            [routing],
            lambda own: own,
            np.array([computed]),
            np.array([scheduled]),
            self._tables,
            num_reqs=1,
            num_tokens=scheduled,
            positions_of=self._positions,
        )
        self.planner.tables.slot_mappings.fill_(PAD_SLOT_ID)
        model, config = self.model, self.config
        hidden = torch.zeros(
            scheduled,
            config.model_config.hf_text_config.hidden_size,
            dtype=dtype_of(config),
            device=self.device,
        )
        positions = Places(np.zeros(scheduled, np.int64), np.arange(scheduled) + computed)
        scores = None
        if self.planner.schedule.encoder_ratio is not None:
            scores = torch.zeros(scheduled, device=self.device)
        metadata = self._metadata(step, computed, scheduled)
        with torch.inference_mode(), set_forward_context(metadata, config, num_tokens=scheduled):
            additions = model.layer_additions(scheduled)
            model.routed_decoder(hidden, self._positions(positions), additions, scores)

    def _positions(self, places: Places) -> torch.Tensor:
        positions = to_device(places.position, self.device)
        return positions.expand(3, -1) if self.config.model_config.uses_mrope else positions

    def _metadata(self, step: RoutedStep, computed: int, scheduled: int) -> dict[str, Any]:
        """By layer name, as the runner would build it."""
        end = computed + scheduled
        starts, lens = np.array([0, scheduled], np.int32), np.array([end], np.int32)
        built: dict[str, Any] = {}
        for groups, table in zip(self.attn_groups, self._tables, strict=True):
            common = CommonAttentionMetadata(
                query_start_loc=to_device(starts, self.device),
                query_start_loc_cpu=torch.from_numpy(starts),
                seq_lens=to_device(lens, self.device),
                seq_lens_cpu_upper_bound=torch.from_numpy(lens),
                num_reqs=1,
                num_actual_tokens=scheduled,
                max_query_len=scheduled,
                max_seq_len=end,
                block_table_tensor=table,
                slot_mapping=torch.full((scheduled,), PAD_SLOT_ID, device=self.device),
            )
            for group in groups:
                builder: Any = group.get_metadata_builder(0)  # one of ours, which takes the step
                metadata = builder.build(0, common, step=step)
                built |= dict.fromkeys(group.layer_names, metadata)
        return built
