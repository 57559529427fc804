"""Values of reroute options, as users write them, and what is wrong with them.

name: of the option, as the error shall call it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raises ValueError for a value that is given and not allowed."""
    if value is not None and value not in allowed:
        raise ValueError(
            f"--reroute-{name} {value!r} is unknown. Choose one of: {', '.join(map(str, allowed))}."
        )


def check_keep(keep: Sequence[float], name: str = "--reroute-keep") -> None:
    """Raises ValueError for a ratio that keeps nothing, or more than there is."""
    for ratio in keep:
        if not 0.0 < ratio <= 1.0:
            raise ValueError(
                f"{name} {ratio:g} is outside (0, 1]: it is the share of an image's visual tokens a "
                "stage keeps. Example: .45,.45,.225,.1126."
            )


def number(name: str, value: Any, kind: type) -> Any:
    """The value as an int or float; None stays. Raises ValueError where it is neither."""
    if value is None:
        return None
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or isinstance(value, bool) or float(number) != float(value):
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"--reroute-{name} {value!r} must be {what}.")
    return number


def numbers(name: str, value: Any, kind: type) -> tuple[Any, ...] | None:
    """A list, tuple or "2,7,15" as numbers; None stays. Raises ValueError for anything else."""
    if value is None:
        return None
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    if not isinstance(value, Sequence):
        raise ValueError(f"--reroute-{name} {value!r} must be a list, such as 2,7,15,23.")
    return tuple(number(name, item, kind) for item in value)
