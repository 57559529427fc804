"""Counts what code asks of the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts what a GPU would be asked to do.

    Views and fresh memory are free. Where `as_one` has a function counted, whatever it does is one
    operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [r.alias_info is not None for r in func._schema.returns]
        writes = any(
            a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments
        )
        is_view = bool(aliases) and all(aliases) and not writes
        if (
            not self.inside
            and not is_view
            and not any(free in func._schema.name for free in ("empty", "view"))
        ):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def as_one(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.seen[name] += 1
            self.inside = True
            try:
                return function(*args)
            finally:
                self.inside = False

        return call
