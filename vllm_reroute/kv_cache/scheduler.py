"""The scheduler of a routed engine: image prompts run whole, sized by what they keep."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_reroute.admission.engine_core import ENGINE_CORE
from vllm_reroute.kv_cache.manager import RoutedAttentionManager
from vllm_reroute.logger import reroute_logger
from vllm_reroute.plan.visual_spans import visual_spans
from vllm_reroute.report import engine_report

logger = reroute_logger(__name__)


class RoutedSchedulerMixin:
    """What routing adds to either of vLLM's schedulers.

    An image request's prompt is scheduled in one step or not at all, because its decisions need
    every prompt token at once; text prompts are chunked as usual. It does not read the prefix
    cache: a cached prefix would leave the deferred tokens' states uncomputed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert not self.defer_block_free, "KV connectors are refused at start"
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            assert isinstance(manager, RoutedAttentionManager), type(manager)
            manager.requests = self.requests
        logger.info("%s", engine_report(self.vllm_config, self.kv_cache_config))

    def add_request(self, request: Request) -> None:
        if visual_spans(request) is not None:
            request.skip_reading_prefix_cache = True
        super().add_request(request)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """As the base, but an image prompt that would be cut waits for the next step."""
        postponed: tuple[list[int], int, int, list[int], list[int]]
        postponed = [], 0, encoder_compute_budget, [], []
        spans = visual_spans(request)
        missing = 0
        if spans is not None and num_computed_tokens < spans.end:
            missing = request.num_prompt_tokens - num_computed_tokens
        if num_new_tokens < missing:
            return postponed
        scheduled = super()._try_schedule_encoder_inputs(
            request,
            num_computed_tokens,
            num_new_tokens,
            encoder_compute_budget,
            shift_computed_tokens,
        )
        return postponed if scheduled[1] < missing else scheduled

    def _free_request_blocks(self, request: Request) -> None:
        """Free from the end, all layers of the same tokens next to each other.

        So an eviction shortens a cached prefix by as many tokens as stock vLLM's would. Group
        after group, the first group alone would pay for it, and a hit needs every layer.
        """
        managers = self.kv_cache_manager.coordinator.single_type_managers
        of_groups = [manager.pop_layer_blocks(request.request_id) for manager in managers]
        of_tokens = zip_longest(*of_groups, fillvalue=())
        blocks = [block for groups in of_tokens for layers in groups for block in layers]
        self.kv_cache_manager.block_pool.free_blocks(reversed(blocks))


class RoutedScheduler(RoutedSchedulerMixin, Scheduler):
    """Routing with vLLM's synchronous scheduler."""


class RoutedAsyncScheduler(RoutedSchedulerMixin, AsyncScheduler):
    """Routing with vLLM's asynchronous scheduler."""


def routed_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Scheduler:
    """`--scheduler-cls` of a routed engine: the subclass that fits `async_scheduling`."""
    ENGINE_CORE.install()
    scheduler = vllm_config.scheduler_config
    scheduler_cls = RoutedAsyncScheduler if scheduler.async_scheduling else RoutedScheduler
    return scheduler_cls(vllm_config, *args, **kwargs)
