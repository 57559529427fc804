"""What choosing decision layers brings, and what letting deferred tokens come back does: a table of both."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.quality.outcomes import Outcome
from benchmarks.quality.scoring import Difference

# Decisions alike in number -> published and calibrated, removing and rerouting.
SQUARES: dict[str, tuple[str, str, str, str]] = {
    "as FastV": ("fastv remove", "calibrated remove once", "fastv reroute", "calibrated reroute"),
    "as PDrop": (
        "pdrop remove",
        "calibrated remove",
        "pdrop reroute",
        "calibrated reroute falling",
    ),
}
EFFECTS = (
    ("layer choice, removing", 1, 0),
    ("layer choice, rerouting", 3, 2),
    ("bypass, published layers", 2, 0),
    ("bypass, calibrated layers", 3, 1),
    ("both", 3, 0),
)


def squares(
    outcomes: Mapping[tuple[str, float | None], Mapping[int, Outcome]], budgets: Sequence[float]
) -> list[dict]:
    """A square per number of decisions and budget whose four methods were all asked, in JSON's types.

    outcomes: of every method and budget, by question.
    """
    found = []
    for title, methods in SQUARES.items():
        for budget in budgets:
            if all((method, budget) in outcomes for method in methods):
                four = [outcomes[method, budget] for method in methods]
                found.append({"title": title, "budget": budget, "effects": list(_effects(four))})
    return found


def _effects(four: Sequence[Mapping[int, Outcome]]) -> Iterator[dict]:
    for name, first, second in EFFECTS:
        difference = Difference.between(four[first], four[second])
        if difference.pairs:
            yield {
                "name": name,
                "difference": difference.value,
                "interval": difference.interval,
                "p_value": difference.p_value,
            }


def markdown(found: Sequence[Mapping]) -> Iterator[str]:
    """One line per square; points with their interval, and where p is below 0.05 in bold."""
    if not found:
        return
    yield "\n## Layer choice and bypass\n"
    yield (
        "What is gained, in points, by calibrated decision layers and ratios, and by letting deferred tokens come\n"
        "back: paired as above, bold where p is below 0.05. `as FastV`: one removal, or four decisions with reroute;\n"
        "`as PDrop`: four decisions either way, ratios that never rise.\n"
    )
    names = [name for name, *_ in EFFECTS]
    yield f"| decisions | budget | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}"
    for square in found:
        cells = [_cell(effect) for effect in square["effects"]]
        yield f"| {square['title']} | {100 * square['budget']:.0f} % | {' | '.join(cells)} |"


def _cell(effect: Mapping) -> str:
    low, high = (100 * end for end in effect["interval"])
    value = f"{100 * effect['difference']:+.1f}"
    bold = "**" * (effect["p_value"] < 0.05)
    return f"{bold}{value}{bold} ({low:+.1f} to {high:+.1f})"
