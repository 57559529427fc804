"""Which cases run on which model runner.

Everything runs on V1. V2 runs in Triton's interpreter, which makes it slow, so it takes a cross-section: each case that
its own code could spoil once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest


def on_runners(
    names: str, cases: Mapping[str, Sequence[Any]], *, v2: Sequence[str]
) -> pytest.MarkDecorator:
    """Parametrises `host` and `names`. cases: id -> values; v2: ids of those that run on both."""
    unknown = set(v2) - cases.keys()
    assert not unknown, f"no such cases: {unknown}"
    chosen = [("v1", case) for case in cases] + [("v2", case) for case in v2]
    return pytest.mark.parametrize(
        ["host", *(name.strip() for name in names.split(","))],
        [pytest.param(runner, *cases[case], id=f"{runner}-{case}") for runner, case in chosen],
        indirect=["host"],
    )
