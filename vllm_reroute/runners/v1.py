"""The V1 model runner (what CPU runs): read its batch, plan the step, set it on the builders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_reroute.attention.step import DUMMY_STEP, RoutedStep, check_graph
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.step_plan import Places
from vllm_reroute.runners.group_builders import GroupBuilders
from vllm_reroute.runners.step_planner import StepPlanner
from vllm_reroute.runners.v1_seeds import withhold_generators
from vllm_reroute.runners.v1_tables import take_over
from vllm_reroute.to_device import to_device

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_input_batch import CachedRequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_PLANNER_ATTRIBUTE = "reroute_planner"
_BUILDERS_ATTRIBUTE = "reroute_builders"
_ROUTING_ATTRIBUTE = "reroute_routing"


@contextmanager
def planned_step(
    runner: GPUModelRunner,
    *,
    num_tokens: int,
    num_reqs: int,
    num_scheduled_tokens: dict[str, int] | None,
    dummy: bool,
    capturing: bool = False,
    full_graph: bool = False,
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """While entered, the metadata builders of a routed model know the step.

    Yields what completes the metadata, by layer name, that vLLM has built meanwhile: in a step it only
    builds that of its first K/V group.

    num_tokens, num_reqs: with padding. num_scheduled_tokens: request id -> tokens of this step.
    dummy: whether this is no step but a dummy run, which has none and is not routed. capturing: whether
    a CUDA graph is about to be captured. full_graph: whether one of the whole model is to run.

    Raises RuntimeError for a step whose tokens are missing. Does nothing for other models.
    """
    decoder = getattr(runner.get_model(), "routed_decoder", None)
    if decoder is None:
        yield _nothing_is_missing
        return
    if dummy != (num_scheduled_tokens is None) or (capturing and not dummy):
        raise RuntimeError(
            "The V1 model runner asks for attention metadata in a way vllm_reroute does not know: "
            f"{'a dummy run' if dummy else 'a step'}, num_scheduled_tokens "
            f"{'missing' if num_scheduled_tokens is None else 'given'}, "
            f"{'to be captured' if capturing else 'not to be captured'}. Serve without "
            "--reroute-schedule."
        )
    if num_scheduled_tokens is None:
        of_all: list[Any] = [
            builder
            for groups in runner.attn_groups
            for group in groups
            for builder in group.metadata_builders
        ]
        try:
            _tell(of_all, DUMMY_STEP)
            yield _nothing_is_missing
        finally:
            _tell(of_all, None)
        return
    if not hasattr(runner, _PLANNER_ATTRIBUTE):
        planner = StepPlanner(runner.vllm_config, runner.kv_cache_config, decoder)
        take_over(runner.input_batch.block_table.block_tables, planner.groups, decoder.tables)
        setattr(runner, _PLANNER_ATTRIBUTE, planner)
        setattr(
            runner, _BUILDERS_ATTRIBUTE, GroupBuilders(runner.kv_cache_config, runner.attn_groups)
        )
    builders: GroupBuilders = getattr(runner, _BUILDERS_ATTRIBUTE)
    step = _V1Batch(runner).plan(num_scheduled_tokens, num_reqs, num_tokens)
    check_graph(step, full_graph=full_graph)
    withhold_generators(runner, num_scheduled_tokens)

    def table_of(group: int) -> torch.Tensor:
        return runner.input_batch.block_table.block_tables[group].get_device_tensor(num_reqs)

    config, runner.kv_cache_config = runner.kv_cache_config, builders.first
    try:
        _tell(builders.of_first, step)
        yield lambda metadata: builders.complete(metadata, step, table_of)
    finally:
        _tell(builders.of_first, None)
        runner.kv_cache_config = config


def _tell(builders: list[Any], step: RoutedStep | None) -> None:
    for builder in builders:
        builder.step = step


def _nothing_is_missing(metadata: dict[str, Any]) -> None:
    """What completes metadata that vLLM builds on its own."""


class _V1Batch:
    """The runner's input batch, in its request order."""

    def __init__(self, runner: GPUModelRunner) -> None:
        self.runner = runner
        self.planner: StepPlanner = getattr(runner, _PLANNER_ATTRIBUTE)
        self.req_ids = runner.input_batch.req_ids[: runner.input_batch.num_reqs]

    def plan(
        self, num_scheduled_tokens: dict[str, int], num_reqs: int, num_tokens: int
    ) -> RoutedStep:
        batch = self.runner.input_batch
        tables = None
        if self.planner.tables.kernel is not None:
            groups = batch.block_table.block_tables
            tables = [table.get_device_tensor(num_reqs) for table in groups]
        return self.planner.plan(
            list(map(self.runner.requests.__getitem__, self.req_ids)),
            self._routing,
            batch.num_computed_tokens_cpu[: batch.num_reqs],
            np.array([num_scheduled_tokens[r] for r in self.req_ids]),
            tables,
            num_reqs=num_reqs,
            num_tokens=num_tokens,
            positions_of=self._positions,
        )

    def _routing(self, state: CachedRequestState) -> RequestRouting | None:
        if not state.mm_features:
            return None
        # Kept on the runner's own state, so that it lives exactly as long as the request.
        if not hasattr(state, _ROUTING_ATTRIBUTE):
            routing = self.planner.request_routing(
                state.mm_features, state.prompt_token_ids, state.sampling_params
            )
            setattr(state, _ROUTING_ATTRIBUTE, routing)
        return getattr(state, _ROUTING_ATTRIBUTE)

    def _positions(self, places: Places) -> torch.Tensor:
        runner = self.runner
        positions = places.position
        if runner.uses_mrope:
            positions = np.zeros((3, len(places)), dtype=np.int64)
            for index in np.unique(places.request).tolist():
                own = places.request == index
                of_request = runner.requests[self.req_ids[index]].mrope_positions
                assert of_request is not None, "the model has them"
                positions[:, own] = of_request.numpy()[:, places.position[own]]
        return to_device(positions, runner.device)
