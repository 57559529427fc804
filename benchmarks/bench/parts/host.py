"""What routing costs the host: a model so thin that Python and small tensors are what a step takes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.bench import targets
from benchmarks.bench.engines import STOCK, EngineSpec
from benchmarks.bench.parts import machinery
from benchmarks.bench.progress import Progress
from benchmarks.bench.settings import Settings

TITLE = "Host"
COMPILED = "compiled"
READING = """\
As *Machinery*, on a model of a few values per token: arithmetic takes next to nothing, so these ratios show what
scheduling, metadata, plans and decisions add to a step. On a GPU the host is what has to keep ahead of the device.
"""
READING_COMPILED = """
The same where vLLM compiles (`torch.compile`, its default), stock and routed alike: layers take less, and decisions run
between compiled pieces, one for every stage and one more.
"""


def waves(settings: Settings, progress: Progress) -> dict[str, Callable[[], dict]]:
    model = settings.thin()
    specs = machinery.saving_nothing(settings, model)
    found = machinery.waves_of(settings, model, specs, progress)
    few = [s for s in specs if s.about(model)["groups"] <= machinery.PUBLISHED_GROUPS]
    compiled = [replace(spec, compiled=True) for spec in (EngineSpec(name=STOCK), *few)]
    found[COMPILED] = partial(machinery.measure, settings, model, compiled, progress)
    return found


def summarise(measured: Mapping[str, dict]) -> dict:
    """`targets` are for the engines of the run's own kind, which the bounds were set for."""
    rows = machinery.rows_of({name: w for name, w in measured.items() if name != COMPILED})
    compiled = machinery.rows_of({COMPILED: measured[COMPILED]} if COMPILED in measured else {})
    return {"rows": rows, "compiled": compiled, "targets": list(_targets(rows))}


def _targets(rows: list[dict]) -> Iterator[dict]:
    for row in rows:
        if row["engine"] == STOCK:
            continue
        few = row["groups"] <= machinery.PUBLISHED_GROUPS
        bound = targets.HOST_STEP_FEW if few else targets.HOST_STEP_MANY
        for key, name in (("decode", "decode step"), ("text_decode", "text decode step")):
            yield targets.at_most(
                f"{name}, thin model, {row['engine']}, over stock", row[key]["median"], bound
            )
        if few:
            yield targets.at_most(
                f"prefill, thin model, {row['engine']}, over stock",
                row["prefill"]["median"],
                targets.HOST_PREFILL,
            )


def markdown(found: dict) -> Iterator[str]:
    yield READING
    yield from machinery.table(found["rows"])
    if found["compiled"]:
        yield READING_COMPILED
        yield from machinery.table(found["compiled"])


def draw(found: dict, folder: Path) -> list[Path]:
    return []
