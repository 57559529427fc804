"""The worker of a routed engine: vLLM's own, which also warms up, and says what has been decided.

Both model runners return their outputs through `Worker.sample_tokens`, so that serves both.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_reroute.plan import late_pictures
from vllm_reroute.plan.decided_turn import send

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.worker_base import CompilationTimes
    from vllm.v1.worker.worker_base import WorkerBase as _Stock

    from vllm_reroute.routing.step_decisions import HostDecisions
else:
    # What stands behind the mixin is known where it is used.
    _Stock = object

_DOT = "/"
"""Stands for a dot in a name that must be an attribute of this module."""


def routed_worker(worker_cls: str) -> str:
    """`--worker-cls` of a routed engine, from the class that serves the platform."""
    return f"{__name__}.{worker_cls.replace('.', _DOT)}"


class RoutedWorker(_Stock):
    """Mixin in front of a worker class of vLLM's."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """At start, once K/V pages are there. The V2 runner runs steps of its own then, and warms up in them."""
        if not self.vllm_config.use_v2_model_runner:
            # Here, since front ends load this module, too.
            from vllm_reroute.runners.warm_up import WarmUp

            # First: vLLM then captures graphs, resets the seed and begins to watch for late compilation.
            WarmUp.of_runner(self.model_runner).run()
        return super().compile_or_warm_up_model()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Hands on what vLLM's runner does not know of: pictures that come late, and what stages hold of
        visual tokens, which goes with the blocks that are about to be copied."""
        late = late_pictures.take(scheduler_output)
        if late:
            # Of V1: the V2 runner is told of a request that comes back as of a new one.
            runner: Any = self.model_runner
            for request_id, features in late.items():
                runner.requests[request_id].mm_features = features
        copies = scheduler_output.kv_cache_block_copies
        if copies:
            model: Any = self.get_model()
            if model.routed_decoder.held_tokens is not None:
                model.routed_decoder.held_tokens.copy(copies)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        output = super().sample_tokens(grammar_output)
        model: Any = self.get_model()
        decisions = model.routed_decoder.take_decisions()
        if decisions is None:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return DecidedOutput(output, decisions)
        return _with(output, decisions)


class DecidedOutput(AsyncModelRunnerOutput):
    """The output of a step that decides, while the device may still be at it."""

    def __init__(self, stock: AsyncModelRunnerOutput, decisions: HostDecisions) -> None:
        self._stock, self._decisions = stock, decisions

    def get_output(self) -> ModelRunnerOutput:
        return _with(self._stock.get_output(), self._decisions)

    def get_kv_connector_output(self) -> Any:
        """From vLLM 0.33 on."""
        stock: Any = self._stock
        return stock.get_kv_connector_output()


def _with(output: ModelRunnerOutput, decisions: HostDecisions) -> ModelRunnerOutput:
    send(output, {output.req_ids[row]: turn for row, turn in decisions.turns().items()})
    return output


@cache
def _routed(worker_cls: str) -> type:
    stock = resolve_obj_by_qualname(worker_cls)
    return type(f"Routed{stock.__name__}", (RoutedWorker, stock), {})


def __getattr__(name: str) -> type:
    """The class that a name of `routed_worker` stands for, made where vLLM looks it up."""
    if _DOT not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _routed(name.replace(_DOT, "."))
