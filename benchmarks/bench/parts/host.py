"""What routing costs the host: a model so thin that Python and small tensors are what a step takes."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.bench import targets
from benchmarks.bench.engines import STOCK
from benchmarks.bench.parts import machinery
from benchmarks.bench.progress import Progress
from benchmarks.bench.settings import Settings

TITLE = "Host"
READING = """\
As *Machinery*, on a model of a few values per token: arithmetic takes next to nothing, so these ratios show what
scheduling, metadata, plans and decisions add to a step. On a GPU the host is what has to keep ahead of the device.
"""


def waves(settings: Settings, progress: Progress) -> dict[str, Callable[[], dict]]:
    model = settings.thin()
    specs = machinery.saving_nothing(settings, model)
    return machinery.waves_of(settings, model, specs, progress)


def summarise(measured: Mapping[str, dict]) -> dict:
    rows = machinery.rows_of(measured)
    return {"rows": rows, "targets": list(_targets(rows))}


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


def draw(found: dict, folder: Path) -> list[Path]:
    return []
