"""A routed model's decoder on vLLM's own layers, with its metadata builders and its pages.

There is no engine around it: `Conversations` says what runs in a step and keeps the block tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.worker.utils import AttentionGroup

from vllm_reroute.attention.step import DUMMY_STEP, RoutedStep
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.step_plan import StepPlan
from vllm_reroute.runners.step_planner import StepPlanner

CPU = torch.device("cpu")


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """vLLM's process groups, of this process alone."""
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, backend="gloo")
        initialize_model_parallel(1, 1)
    try:
        yield
    finally:
        cleanup_dist_env_and_memory()


class RoutedModel:
    """Random weights; every layer and the parked states share one pool of pages."""

    def __init__(self, vllm_config: VllmConfig, *, num_blocks: int = 800, seed: int = 0) -> None:
        self.config = vllm_config
        model_config = vllm_config.model_config
        with set_current_vllm_config(vllm_config), set_default_torch_dtype(model_config.dtype):
            self.model = initialize_model(vllm_config)
            generator = torch.Generator().manual_seed(seed)
            for name, weight in self.model.named_parameters():
                if "norm" not in name:
                    values = torch.randn(weight.shape, generator=generator)
                    weight.data.copy_(values * 2 / weight.shape[-1] ** 0.5)
            self.decoder = self.model.routed_decoder
            process_weights_after_loading(self.model, model_config, CPU)
        self.hidden_size = model_config.hf_text_config.hidden_size
        self.schedule = self.decoder.schedule
        layers = vllm_config.compilation_config.static_forward_context
        names = self.decoder._names
        self.parked = self.decoder._parked[0]
        self.layers_of = [names[s.first_layer : s.end_layer] for s in self.schedule.stages]
        self.layers_of.append((self.parked.layer_name,))
        specs = [layers[of[0]].get_kv_cache_spec(vllm_config) for of in self.layers_of]
        self.kv_cache_config = KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[
                KVCacheGroupSpec([of[0]], spec)
                for of, spec in zip(self.layers_of, specs, strict=True)
            ],
        )
        self.attn_groups = [
            [AttentionGroup(layers[of[0]].attn_backend, list(of), spec, group)]
            for group, (of, spec) in enumerate(zip(self.layers_of, specs, strict=True))
        ]
        with set_current_vllm_config(vllm_config):
            for (group,) in self.attn_groups:
                group.create_metadata_builders(vllm_config, CPU)
        self.builders = [group.get_metadata_builder() for (group,) in self.attn_groups]
        spec = specs[0]
        self.block_size = spec.block_size
        shape = (num_blocks, spec.num_kv_heads, spec.block_size, 2 * spec.head_size)
        self.pool = torch.randn(shape, dtype=spec.dtype, generator=None)
        for of in self.layers_of:
            for name in of:
                layers[name].kv_cache = self.pool
        self.planner = StepPlanner(vllm_config, self.kv_cache_config, self.decoder)

    def metadata(self, common: Sequence[CommonAttentionMetadata], step: RoutedStep) -> dict:
        """By layer name, for a `common` per K/V group."""
        built: dict[str, Any] = {}
        for of, builder, own in zip(self.layers_of, self.builders, common, strict=True):
            built |= dict.fromkeys(of, builder.build(0, own, step=step))
        return built

    def forward(
        self, states: torch.Tensor, positions: torch.Tensor, metadata: dict[str, Any] | None
    ) -> torch.Tensor:
        with (
            torch.no_grad(),
            set_current_vllm_config(self.config),
            set_forward_context(metadata, self.config, num_tokens=len(states)),
        ):
            return self.decoder(states.clone(), positions)


@dataclass
class Conversation:
    """A request. states: [tokens, hidden], embeddings of its prompt and of what it will generate."""

    routing: RequestRouting | None
    states: torch.Tensor
    computed: int = 0


class Conversations:
    """Requests with blocks for as many tokens as they will ever have."""

    def __init__(self, model: RoutedModel, requests: Sequence[Conversation]) -> None:
        self.model, self.requests = model, list(requests)
        used = 1
        self.tables: list[torch.Tensor] = []
        groups = model.kv_cache_config.kv_cache_groups
        for spec in (group.kv_cache_spec for group in groups):
            entries = spec.max_num_blocks_per_req(
                model.config, model.config.model_config.max_model_len
            )
            table = torch.zeros(len(self.requests), entries, dtype=torch.int32)
            for row, request in zip(table, self.requests, strict=True):
                count = -(-len(request.states) // model.block_size) * spec.num_layers
                row[:count] = torch.arange(used, used + count)
                used += count
            self.tables.append(table)
        assert used <= model.kv_cache_config.num_blocks, used

    def share(
        self, owner: int, reader: int, num_tokens: int, text_owner: int | None = None
    ) -> None:
        """Let a request begin with the blocks of another one, as a prefix-cache hit does.

        text_owner: whose blocks it has after the first decision, where those of `owner` are gone.
        """
        routing = self.requests[reader].routing
        dense = 0 if routing is None else routing.dense_stages
        for group, table in enumerate(self.tables):
            spec = self.model.kv_cache_config.kv_cache_groups[group].kv_cache_spec
            everywhere = routing is None or group < dense or group == len(self.tables) - 1
            tokens = num_tokens if everywhere else min(num_tokens, routing.text_prefix)
            count = tokens // self.model.block_size * spec.num_layers
            of = owner if everywhere or text_owner is None else text_owner
            table[reader, :count] = table[of, :count]
        self.requests[reader].computed = num_tokens

    def common(self, running: Sequence[int], scheduled: Sequence[int]) -> list:
        """The runner's metadata of a step, per K/V group."""
        ends = [self.requests[i].computed + n for i, n in zip(running, scheduled, strict=True)]
        starts = torch.tensor([0, *np.cumsum(scheduled)], dtype=torch.int32)
        lens = torch.tensor(ends, dtype=torch.int32)
        return [
            CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts,
                seq_lens=lens,
                seq_lens_cpu_upper_bound=lens,
                num_reqs=len(running),
                num_actual_tokens=sum(scheduled),
                max_query_len=max(scheduled),
                max_seq_len=max(ends),
                block_table_tensor=table[list(running)],
                slot_mapping=torch.full((sum(scheduled),), -1),
            )
            for table in self.tables
        ]

    def plan(self, running: Sequence[int], scheduled: Sequence[int]) -> RoutedStep:
        requests = [self.requests[i] for i in running]
        return self.model.planner.plan(
            requests,
            lambda request: request.routing,
            np.array([request.computed for request in requests]),
            np.array(scheduled),
            [table[list(running)] for table in self.tables],
            num_reqs=len(running),
            num_tokens=sum(scheduled),
            positions_of=lambda places: torch.from_numpy(places.position),
        )

    def step(self, scheduled: dict[int, int]) -> dict[int, torch.Tensor]:
        """Run some tokens of some requests; their final hidden states [tokens, hidden]."""
        running, counts = list(scheduled), list(scheduled.values())
        step, common = self.plan(running, counts), self.common(running, counts)
        metadata = self.model.metadata(common, step)
        ranges = [(self.requests[i], n) for i, n in scheduled.items()]
        states = torch.cat([r.states[r.computed : r.computed + n] for r, n in ranges])
        positions = torch.cat([torch.arange(r.computed, r.computed + n) for r, n in ranges])
        output = self.model.forward(states, positions, metadata)
        for request, count in ranges:
            request.computed += count
        return dict(zip(running, output.split(counts), strict=True))

    def dummy(self, num_tokens: int) -> torch.Tensor:
        """A run as vLLM makes them to warm up, over the blocks the requests have."""
        counts = [num_tokens // len(self.requests)] * len(self.requests)
        common = self.common(range(len(self.requests)), counts)
        metadata = self.model.metadata(common, DUMMY_STEP)
        states = torch.randn(sum(counts), self.model.hidden_size)
        return self.model.forward(states, torch.arange(len(states)), metadata)


def plan_in(metadata: dict[str, Any]) -> StepPlan | None:
    """The plan that travels with a step's metadata."""
    plans = {id(m.plan): m.plan for m in metadata.values() if hasattr(m, "plan")}
    (plan,) = plans.values()
    return plan


def runner_of(model: RoutedModel, **fields: Any) -> SimpleNamespace:
    """What the V1 hook reads of a model runner."""
    return SimpleNamespace(
        get_model=lambda: model.model,
        vllm_config=model.config,
        kv_cache_config=model.kv_cache_config,
        attn_groups=model.attn_groups,
        device=CPU,
        uses_mrope=False,
        **fields,
    )
