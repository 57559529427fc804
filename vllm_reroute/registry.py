"""What users choose by name: built-in things, and those of other distributions' entry points."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib import metadata
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_NAME = re.compile(r"[a-z][a-z0-9_-]*")


class Registry(Mapping[str, T], Generic[T]):
    """Name -> thing. Reading names imports nothing; a thing is imported when it is asked for.

    Every process finds the same, since it reads what is installed. Names never raise, so that a
    broken distribution cannot harm an engine that does not route; `check` and loading do.

    kind: what a thing is called in errors. group: of entry points. built_in: name ->
    `module:attribute`, as an entry point says it. reserved: names that mean something else.
    problem: what is wrong with a loaded object, in words that continue "it …"; None if nothing is.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        built_in: Mapping[str, str],
        *,
        reserved: Sequence[str] = (),
        problem: Callable[[Any], str | None],
    ) -> None:
        self.kind, self.group = kind, group
        self._built_in, self._reserved, self._problem = built_in, reserved, problem
        self._loaded: dict[str, T] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(entry.name for entry in self._entries))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return any(entry.name == name for entry in self._entries)

    def __getitem__(self, name: str) -> T:
        """Raises KeyError for an unknown name, ValueError for one that cannot be used."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def origin(self, name: str) -> str | None:
        """The distribution that brings it, with its version; None for a built-in one."""
        return next(_origin(entry) for entry in self._entries if entry.name == name)

    def title(self, name: str) -> str:
        """The name, with its distribution where it is not built in."""
        origin = self.origin(name)
        return name if origin is None else f"{name} (from {origin})"

    def check(self) -> None:
        """Raises ValueError for names that cannot be used. Imports nothing."""
        for problem in self._name_problems:
            raise ValueError(problem)

    def problems(self) -> list[str]:
        """All that is wrong with what is installed, a sentence each. Imports everything."""
        found = list(self._name_problems)
        for name in [] if found else self:
            try:
                self[name]
            except ValueError as error:
                found.append(str(error))
        return found

    @cached_property
    def _entries(self) -> list[metadata.EntryPoint]:
        built_in = [
            metadata.EntryPoint(name, at, self.group) for name, at in self._built_in.items()
        ]
        return [*built_in, *metadata.entry_points(group=self.group)]

    @cached_property
    def _name_problems(self) -> list[str]:
        found: list[str] = []
        seen: dict[str, metadata.EntryPoint] = {}
        for entry in self._entries:
            what = f"{entry.name!r} of {_origin(entry)} (entry point {self.group})"
            cure = "Uninstall it, or have its author choose another name."
            if entry.name in seen:
                other = _origin(seen[entry.name]) or "vllm-reroute itself"
                found.append(f"The {self.kind} {what} has the same name as one of {other}. {cure}")
            elif entry.name in self._reserved or not _NAME.fullmatch(entry.name):
                found.append(
                    f"The {self.kind} {what} has a name that cannot be used. Allowed: lower-case "
                    "letters, digits, - and _, a letter first, but not "
                    f"{', '.join(self._reserved) or 'one in use'}. {cure}"
                )
            seen.setdefault(entry.name, entry)
        return found

    def _load(self, name: str) -> T:
        entry = next((entry for entry in self._entries if entry.name == name), None)
        if entry is None:
            raise KeyError(name)
        self.check()
        try:
            made = entry.load()
        except Exception as error:
            cause = f"cannot be imported: {type(error).__name__}: {error}"
            raise ValueError(self._broken(entry, cause)) from error
        wrong = self._problem(made)
        if wrong is not None:
            raise ValueError(self._broken(entry, f"cannot be used: it {wrong}"))
        return made

    def _broken(self, entry: metadata.EntryPoint, wrong: str) -> str:
        others = ", ".join(self._built_in)
        return (
            f"The {self.kind} {entry.name!r} of {_origin(entry)} ({entry.value}) {wrong}. Repair or "
            f"uninstall that distribution, or choose one of: {others}."
        )


def _origin(entry: metadata.EntryPoint) -> str | None:
    return None if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
