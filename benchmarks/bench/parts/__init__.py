"""The parts of the suite. Each is a module of

TITLE: heading of its section.
waves(settings, progress): name -> function that measures and returns JSON's types. A wave is what is
    measured side by side, and what a later run need not measure again.
summarise(measured): from the waves at hand (name -> what was measured) to the section's rows and targets.
markdown(found): the section's lines, from what `summarise` returned.
draw(found, folder): its plots.
"""

from types import ModuleType

from benchmarks.bench.parts import (
    capacity,
    chat,
    host,
    machinery,
    prefill,
    reference,
    reuse,
    scaling,
    serving,
)

PARTS: dict[str, ModuleType] = {
    "prefill": prefill,
    "reuse": reuse,
    "chat": chat,
    "machinery": machinery,
    "host": host,
    "serving": serving,
    "capacity": capacity,
    "reference": reference,
    "scaling": scaling,
}
"""In the order they are measured: a run that is cut off has the first ones."""
