"""The front ends' part: vLLM's statistics logger that shows what schedulers have counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from vllm_reroute.metrics.carrier import counts_of
from vllm_reroute.metrics.catalogue import METRICS, Kind, Metric
from vllm_reroute.schedule import RoutingSchedule, is_routed
from vllm_reroute.vllm_seams.hook import Hook


class RoutedStatLogger(AggregateStatLoggerBase):
    """Metrics of the routed engines that a front end speaks to.

    With several front ends a scheduler tells each thing to one of them, and vLLM shows their sum.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self._vllm_config, self._engines = vllm_config, engine_indexes
        self._update: dict[tuple[int, str], Callable[[float], None]] = {}

    def log_engine_initialized(self) -> None:
        """Make the metrics: vLLM's own logger, made after this one, removes what it finds."""
        for metric in METRICS:
            self._make(metric)

    def _make(self, metric: Metric) -> None:
        labels = ("model_name", "engine", *metric.labels)
        shown: Counter | Gauge
        if metric.kind is Kind.COUNTER:
            shown = Counter(metric.name, metric.help, labels)
        else:
            shown = Gauge(metric.name, metric.help, labels, multiprocess_mode="mostrecent")
        model = self._vllm_config.model_config.served_model_name
        for engine in self._engines:
            for values in metric.values(RoutingSchedule.of(self._vllm_config)):
                child = shown.labels(model, str(engine), *values)
                update = child.inc if isinstance(child, Counter) else child.set
                self._update[engine, metric.series(*values)] = update

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take over what one scheduler has counted."""
        if scheduler_stats is not None:
            for series, value in counts_of(scheduler_stats).items():
                self._update[engine_idx, series](value)


def _init_manager(
    original: Callable[..., Any],
    self: Any,
    vllm_config: VllmConfig,
    engine_idxs: Any = None,
    custom_stat_loggers: Any = None,
    **kwargs: Any,
) -> None:
    if is_routed(vllm_config):
        custom_stat_loggers = [*(custom_stat_loggers or ()), RoutedStatLogger]
    original(self, vllm_config, engine_idxs, custom_stat_loggers, **kwargs)


STAT_LOGGERS = Hook(
    name="stat_logger_manager_init",
    module="vllm.v1.metrics.loggers",
    qualname="StatLoggerManager.__init__",
    parameters=("self", "vllm_config", "engine_idxs", "custom_stat_loggers"),
    wrapper=_init_manager,
)
