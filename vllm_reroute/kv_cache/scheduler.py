"""The scheduler of a routed engine: image prompts sized by what they keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_reroute.admission.engine_core import ENGINE_CORE
from vllm_reroute.kv_cache import interleaving
from vllm_reroute.kv_cache.decided_turns import DecidedTurns
from vllm_reroute.kv_cache.decode_blocks import DecodeBlocks
from vllm_reroute.kv_cache.engine_report import engine_report
from vllm_reroute.kv_cache.kept_turns import KeptTurns
from vllm_reroute.kv_cache.layered_manager import LayeredManager
from vllm_reroute.kv_cache.live_routing import LiveRouting
from vllm_reroute.kv_cache.parked_manager import ParkedManager
from vllm_reroute.kv_cache.prefix_hits import PrefixHits
from vllm_reroute.logger import reroute_logger
from vllm_reroute.metrics import carrier
from vllm_reroute.metrics.counting import RoutingCounts
from vllm_reroute.plan import late_pictures
from vllm_reroute.plan.chunks import LAST_TOKENS, prefill_chunk
from vllm_reroute.plan.decided_turn import turns_of
from vllm_reroute.schedule import RoutingSchedule

logger = reroute_logger(__name__)


# What stands behind the mixin is one of vLLM's schedulers, and which is known only below.
if TYPE_CHECKING:
    _Stock = Scheduler
else:
    _Stock = object


class RoutedSchedulerMixin(_Stock):
    """What routing adds to either of vLLM's schedulers.

    Prompts are chunked and reuse the prefix cache as in vLLM. The step that runs a turn's last token
    (that of an image prompt, unless its history keeps its choice) also runs its text and candidates
    through all stages after the first decision, tokens of earlier steps included: such rows are
    charged too, see `_hold_back`. A step ends no more than one turn of a request.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert not self.defer_block_free, "KV connectors are refused at start"
        managers: Any = self.kv_cache_manager.coordinator.single_type_managers
        assert all(isinstance(manager, LayeredManager) for manager in managers)
        self.live = LiveRouting(
            self.requests,
            RoutingSchedule.of(self.vllm_config),
            block_size=managers[0].block_size,
            offers_parked=self.kv_cache_manager.enable_caching,
            max_step_tokens=self.max_num_scheduled_tokens,
        )
        for manager in managers:
            manager.live = self.live
        self.parked_pages: ParkedManager = next(
            manager for manager in managers if isinstance(manager, ParkedManager)
        )
        self.kept_turns = KeptTurns(self.kv_cache_manager, self.live)
        hits = PrefixHits(self.kv_cache_manager, self.live, self.kept_turns)
        hooked: Any = self.kv_cache_manager
        hooked.get_computed_blocks = hits.get_computed_blocks
        hooked.estimate_cached_tokens = hits.num_offered
        self.decode_blocks = DecodeBlocks(self.kv_cache_manager, self.live)
        hooked.allocate_slots = self.decode_blocks.allocate_slots
        self.counts = RoutingCounts(
            self.live,
            block_bytes=self.parked_pages.kv_cache_spec.page_size_bytes,
            parked_blocks=self.parked_pages.num_held,
        )
        self.decided_turns = DecidedTurns(self.requests, self.counts)
        self._record_stock = self.kv_cache_manager.record_prefix_cache_stats
        hooked.record_prefix_cache_stats = self._record_prefix_cache_stats
        self._deciding = 0, 0
        self._withheld: dict[str, set[int]] = {}
        """By request id, the pictures that a worker was not sent, see `late_pictures`."""
        logger.info("%s", engine_report(self.vllm_config, self.kv_cache_config))

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._deciding = 0, 0
        output = super().schedule(*args, **kwargs)
        self._send_late_pictures(output)
        if self.live.schedule.marker and self.live.offers_parked:
            for request_id in output.num_scheduled_tokens:
                self.kept_turns.offer(self.requests[request_id])
        self.parked_pages.release_decided()
        self.counts.scheduled(output)
        return output

    def _send_late_pictures(self, output: SchedulerOutput) -> None:
        for new in output.scheduled_new_reqs:
            found = self.parked_pages.num_found(new.req_id)
            places = [one.mm_position for one in self.requests[new.req_id].mm_features]
            ends = enumerate(place.offset + place.length for place in places)
            self._withheld[new.req_id] = {number for number, end in ends if end <= found}
        encoded = output.scheduled_encoder_inputs.items()
        late = [name for name, numbers in encoded if self._withheld[name].intersection(numbers)]
        if late:
            late_pictures.send(output, {name: self.requests[name].mm_features for name in late})
            self._withheld.update((name, set()) for name in late)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        self.decided_turns.take(turns_of(model_runner_output))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self.decided_turns.tell(outputs)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            carrier.send(stats, self.counts.take())
        return stats

    def _record_prefix_cache_stats(self, request: Request, num_hits: int) -> None:
        self._record_stock(request, num_hits)
        if self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            self.counts.read_from_cache(request, num_hits)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """As the base, up to the end of a turn; one whose decisions do not fit this step stops before
        its last tokens."""
        if num_computed_tokens >= request.num_prompt_tokens:
            # All images are behind: nothing to look up in a decode step.
            return [], num_new_tokens, encoder_compute_budget, [], []
        routing = self.live.of(request)
        turn = routing.turns.undecided_at(num_computed_tokens) if routing else None
        if turn is not None and turn.end < request.num_prompt_tokens:
            num_new_tokens = min(num_new_tokens, turn.end - num_computed_tokens)
        stock = super()._try_schedule_encoder_inputs(
            request,
            num_computed_tokens,
            num_new_tokens,
            encoder_compute_budget,
            *args,
            **kwargs,
        )
        num_new_tokens = stock[1]
        if turn is not None:
            if self._hold_back(turn.end, num_computed_tokens, num_new_tokens):
                num_new_tokens = turn.end - LAST_TOKENS - num_computed_tokens
            stops = self.live.stops_of(request, turn)
            num_new_tokens = prefill_chunk(turn, stops, num_computed_tokens, num_new_tokens)
        if num_new_tokens == 0 and request.status is not RequestStatus.RUNNING:
            # It stays in the queue: what the base has reserved for it, others may need.
            self.encoder_cache_manager.free(request)
        return stock[0], num_new_tokens, *stock[2:]

    def _hold_back(self, end: int, num_computed: int, num_new: int) -> bool:
        """Whether taking the decisions of a turn that ends at `end` now would make the step too large.

        A decision looks at its prompts side by side, padded to the longest: together no more than a
        step's tokens, or one prompt's.
        """
        if num_computed + num_new < end:
            return False
        count, width = self._deciding
        count, width = count + 1, max(width, num_computed + num_new)
        if count > 1 and count * width > self.max_num_scheduled_tokens:
            return True
        self._deciding = count, width
        return False

    def _free_request_blocks(self, request: Request) -> None:
        """Free from the end, all layers of the same tokens next to each other.

        So an eviction shortens a cached prefix by as many tokens as stock vLLM's would. Group
        after group, the first group alone would pay for it, and a hit needs every layer.

        With priorities vLLM preempts requests that it has just planned into the step, and leaves
        their blocks in the prefix cache as if they had run.
        """
        if request.is_finished():
            if self.live.schedule.marker and self.live.offers_parked:
                self.kept_turns.ended(request)
            self.counts.finished(request)
            self.decided_turns.forget(request)
            self._withheld.pop(request.request_id, None)
        self.decode_blocks.forget(request)
        self.kept_turns.forget(request)
        managers: Any = self.kv_cache_manager.coordinator.single_type_managers
        for manager in managers:
            manager.withdraw(request)
        groups = [(m.pop_blocks_for_free(request.request_id), m.num_layers) for m in managers]
        self.kv_cache_manager.block_pool.free_blocks(reversed(interleaving.by_tokens(groups)))


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
