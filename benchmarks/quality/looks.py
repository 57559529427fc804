"""Reroute against removal, apart for questions that one look at the picture answers and for those that take two."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.grounding.questions import TWO_LOOKS
from benchmarks.quality.outcomes import Outcome
from benchmarks.quality.scoring import Difference, Score

PAIRS = (("fastv reroute", "fastv remove"), ("pdrop reroute", "pdrop remove"))
HEADING = """
## One look or two

Two looks: what the question names says where its answer is ({two}). One look: all other kinds. Accuracy in % and
differences in points, as above; none of it is corrected for the number of comparisons.
"""


def looks(
    outcomes: Mapping[tuple[str, float | None], Mapping[int, Outcome]], budgets: Sequence[float]
) -> list[dict]:
    """Both methods of a pair and their difference, per number of looks and budget, in JSON's types.

    outcomes: of every method and budget, by question.
    """
    found = []
    for pair in PAIRS:
        for budget in budgets:
            if not all((method, budget) in outcomes for method in pair):
                continue
            for number in (1, 2):
                first, second = (_with_looks(outcomes[method, budget], number) for method in pair)
                difference = Difference.between(first, second)
                if difference.pairs:
                    found.append(
                        {
                            "looks": number,
                            "methods": list(pair),
                            "budget": budget,
                            "accuracies": [_score(first), _score(second)],
                            "difference": difference.value,
                            "interval": difference.interval,
                            "p_value": difference.p_value,
                            "pairs": difference.pairs,
                        }
                    )
    return found


def _with_looks(outcomes: Mapping[int, Outcome], number: int) -> dict[int, Outcome]:
    return {i: each for i, each in outcomes.items() if (each.kind in TWO_LOOKS) == (number == 2)}


def _score(outcomes: Mapping[int, Outcome]) -> dict:
    score = Score.of(outcomes.values())
    return {"accuracy": score.accuracy, "interval": score.interval}


def markdown(found: Sequence[Mapping]) -> Iterator[str]:
    if not found:
        return
    yield HEADING.format(two=", ".join(f"`{kind}`" for kind in TWO_LOOKS))
    yield (
        "| looks | first - second | budget | first | second | difference | p | questions |"
        "\n|---|---|---|---|---|---|---|---|"
    )
    for each in sorted(found, key=lambda each: each["looks"]):
        low, high = (100 * end for end in each["interval"])
        cells = [
            str(each["looks"]),
            " - ".join(each["methods"]),
            f"{100 * each['budget']:.0f} %",
            *map(_share, each["accuracies"]),
            f"{100 * each['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
            "< 0.0001" if each["p_value"] < 1e-4 else f"{each['p_value']:.4f}",
            f"{each['pairs']:,}",
        ]
        yield f"| {' | '.join(cells)} |"


def _share(score: Mapping) -> str:
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
