"""How the servers of this folder run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

WORKERS_APART = "test_plugins"


@pytest.fixture(scope="module", autouse=True)
def _workers_in_their_engine_core(request: pytest.FixtureRequest) -> Iterator[None]:
    """Importing vLLM is most of what a server's start costs, in each of its processes.

    On CPU vLLM gives the worker of a single rank a process besides its engine core's, unless this variable says
    otherwise. It does so in `WORKERS_APART`; several tensor-parallel ranks are always apart.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem != WORKERS_APART:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield
