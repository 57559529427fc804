"""A process that builds one vLLM engine after another and runs test functions inside it.

Engines live in a process of their own because the V2 runner needs environment variables set
before vLLM is imported, and because a test must be able to look into the engine: the engine core
runs in that same process, so a function sent there sees scheduler, block pool and model.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

BASE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Engines side by side must not be bound to one and the same core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # These models are too small for a second thread, and threads that wait spin.
    "OMP_NUM_THREADS": "1",
}
V2_ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
TIMEOUT_S = 400


class EngineHost:
    """Starts on first use; `close` ends it."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._environment = {**BASE_ENVIRONMENT, **(environment or {})}
        self._process: Any = None
        self._connection: Connection | None = None
        self._built: dict[str, Any] | None = None

    def engine(self, **engine_args: Any) -> EngineHost:
        """Make sure the process holds an engine with these arguments, and none other."""
        if self._built != engine_args:
            self._built = None
            self._send("build", engine_args)
            self._built = engine_args
        return self

    def forget(self) -> None:
        """The engine is no longer what its arguments say: the next `engine` builds one anew."""
        self._built = None

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(llm, *args, **kwargs)` in the engine's process; errors come back as they are."""
        return self._send("call", (function, args, kwargs))

    def close(self) -> None:
        if self._process is not None:
            self._connection.send(("stop", None))
            self._process.join(30)
            if self._process.is_alive():
                self._process.kill()
            self._process = None

    def _send(self, command: str, payload: Any) -> Any:
        if self._process is None:
            context = get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._environment))
            self._process.start()
        self._connection.send((command, payload))
        if not self._connection.poll(TIMEOUT_S):
            self._process.kill()
            self._process = None
            raise TimeoutError(f"the engine did not answer {command} within {TIMEOUT_S} s")
        try:
            failed, result = self._connection.recv()
        except EOFError:
            self._process = None
            raise RuntimeError(f"the engine's process died on {command}") from None
        if failed:
            raise result
        return result


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    if "TRITON_INTERPRET" in environment:
        _pretend_triton_runs_here()
    freeze = _freeze_when_told()
    llm = None
    while True:
        command, payload = connection.recv()
        if command == "stop":
            _drop(llm)
            return
        try:
            if command == "build":
                llm = _drop(llm)
                from vllm import LLM

                _look_at_models_here()
                freeze()
                llm, result = LLM(**payload), None
            else:
                function, args, kwargs = payload
                result = function(llm, *args, **kwargs)
            connection.send((False, result))
        except BaseException as error:
            error.add_note(traceback.format_exc())
            connection.send((True, _picklable(error)))


def _drop(llm: Any) -> None:
    if llm is not None:
        from vllm.distributed import cleanup_dist_env_and_memory

        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _picklable(error: BaseException) -> BaseException:
    notes = "\n".join(getattr(error, "__notes__", ()))
    kind = (
        type(error) if type(error) in (ValueError, RuntimeError, AssertionError) else RuntimeError
    )
    if isinstance(error, ValueError):
        kind = ValueError
    plain = kind(str(error))
    plain.add_note(notes)
    return plain


def _freeze_when_told() -> Callable[[], None]:
    """Takes gc.freeze and gc.unfreeze away from vLLM and returns the former, to be called while there is no engine.

    Nine times in an engine's life vLLM collects garbage, among all that its imports have left: three of the
    four seconds that such an engine takes. What is frozen is not looked at; what an engine leaves is.
    """
    freeze = gc.freeze
    gc.freeze = gc.unfreeze = lambda: None  # type: ignore[assignment]
    return freeze


def _look_at_models_here() -> None:
    """vLLM imports a class it does not know yet in a process of its own, for the sake of GPUs: ten seconds for
    each of them on a machine that has never served it."""
    from vllm.model_executor.models import registry

    assert callable(registry._run_in_subprocess)
    registry._run_in_subprocess = lambda look: look()


def _pretend_triton_runs_here() -> None:
    """Let vLLM take Triton's interpreter for a CPU backend, so that the V2 runner can run."""
    import triton.backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    class Backend:
        compiler = None
        driver = Driver

    triton.backends.backends["cpu"] = Backend
