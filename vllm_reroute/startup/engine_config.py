"""From engine arguments with reroute options to the configuration of a routed engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.platforms import current_platform

from vllm_reroute.attention.backend import smallest_block_size
from vllm_reroute.families.deepstack import first_decision_layer
from vllm_reroute.models.architecture import RoutedArchitecture
from vllm_reroute.nuwa.requirements import check_encoder_options
from vllm_reroute.plan.capacity import bounded_block_size
from vllm_reroute.runners.worker import routed_worker
from vllm_reroute.schedule import CONFIG_KEY, SCHEDULE_KEY, RerouteOptions
from vllm_reroute.startup.attention_backend import choose_attention_backend
from vllm_reroute.startup.calibrated import with_calibration
from vllm_reroute.startup.refusals import check_arguments, check_config
from vllm_reroute.startup.turn_marker import turn_marker
from vllm_reroute.vllm_seams.seams import check_vllm

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

SCHEDULER = "vllm_reroute.kv_cache.scheduler.routed_scheduler"


@contextmanager
def request_routing(engine_args: EngineArgs, options: RerouteOptions) -> Iterator[None]:
    """While vLLM builds its config: ask for the routed model class and scheduler.

    Raises ValueError for arguments routing cannot honour.
    """
    check_vllm()
    check_arguments(engine_args)
    wanted = {
        "hf_overrides": RoutedArchitecture(
            engine_args.hf_overrides, nuwa=options.starts_in_encoder
        ),
        "scheduler_cls": SCHEDULER,
    }
    given = {name: getattr(engine_args, name) for name in wanted}
    vars(engine_args).update(wanted)
    try:
        yield
    finally:
        vars(engine_args).update(given)


def configure_routing(vllm_config: VllmConfig, options: RerouteOptions) -> VllmConfig:
    """Complete a config built under `request_routing`: resolve the schedule for this model's depth.

    Raises ValueError for a schedule or feature that does not fit.
    """
    model_config = vllm_config.model_config
    options = with_calibration(options, model_config.model, model_config.hf_config)
    schedule = options.resolve(
        model_config.hf_text_config.num_hidden_layers,
        first_decision_layer(model_config.hf_config),
    )
    if schedule.keeps_turns or options.turn_marker is not None:
        marker = turn_marker(model_config, options.turn_marker)
        schedule = replace(schedule, marker=marker)
    assert isinstance(vllm_config.additional_config, dict), "reroute's options are an entry of it"
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        CONFIG_KEY: options.to_mapping(),
        SCHEDULE_KEY: schedule.to_dict(),
    }
    parallel = vllm_config.parallel_config
    parallel.worker_cls = routed_worker(parallel.worker_cls)
    choose_attention_backend(vllm_config)
    _choose_block_size(vllm_config)
    check_config(vllm_config)
    if options.starts_in_encoder:
        check_encoder_options(vllm_config)
    return vllm_config


def _choose_block_size(vllm_config: VllmConfig) -> None:
    """The smallest block whose tables are not out of proportion, unless the user named one.

    On CPU the platform has fixed a default before any backend is asked. Elsewhere vLLM takes its
    default, which is the smallest, unless a size is named.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if cache.user_specified_block_size:
        return
    smallest = cache.DEFAULT_BLOCK_SIZE
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        smallest = smallest_block_size(CPUAttentionBackend)
    size = bounded_block_size(
        smallest,
        model.hf_text_config.num_hidden_layers,
        vllm_config.scheduler_config.max_num_seqs,
        model.max_model_len,
    )
    if current_platform.is_cpu() or size > smallest:
        # As if the user had: vLLM resolves what is unset once more in every worker.
        cache.block_size, cache.user_specified_block_size = size, True
