"""What a hook is, and how one is installed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_MARK = "__vllm_reroute_hook__"


@dataclass(frozen=True, kw_only=True)
class Hook:
    """One wrapped function of vLLM.

    name: also the stem of its diff in `patches/`. module, qualname: what is wrapped.
    parameters: leading parameter names it was written for. wrapper: called as
    `wrapper(original, *args, **kwargs)` in place of the original.
    """

    name: str
    module: str
    qualname: str
    parameters: tuple[str, ...]
    wrapper: Callable[..., Any]

    def install(self) -> None:
        """Wrap the target once; later calls do nothing.

        Raises RuntimeError when the target is gone or takes other parameters.
        """
        owner_name, _, attribute = self.qualname.rpartition(".")
        owner = getattr(import_module(self.module), owner_name, None)
        declared: Any = inspect.getattr_static(owner, attribute, None) if owner else None
        kind = type(declared) if isinstance(declared, (staticmethod, classmethod)) else None
        original = declared.__func__ if kind else declared
        if getattr(original, _MARK, None) == self.name:
            return
        self._check(original)

        @functools.wraps(original)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            return self.wrapper(original, *args, **kwargs)

        setattr(hooked, _MARK, self.name)
        setattr(owner, attribute, kind(hooked) if kind else hooked)

    def _check(self, original: Any) -> None:
        import vllm

        found = None
        if callable(original):
            found = tuple(inspect.signature(original).parameters)[: len(self.parameters)]
        if found != self.parameters:
            raise RuntimeError(
                f"vllm_reroute hooks {self.module}.{self.qualname}{self.parameters}, but vLLM "
                f"{vllm.__version__} has {found or 'no such function'} there. Install the vLLM "
                "version vllm_reroute was tested with (pip install 'vllm==0.32.*'), or uninstall vllm-reroute."
            )
