"""Whether `recall` is worth building: conversations by every method, a table of answers and cost.

python -m benchmarks.quality.recall --model benchmarks/grounding/conversing --count 1000 --out benchmarks/results/recall
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.grounding.conversations import (
    BESIDE_IT,
    NEW_PICTURE,
    OTHER,
    SAME,
    conversations,
)
from benchmarks.grounding.evaluate_talks import MODEL
from benchmarks.quality.model_shape import fingerprint
from benchmarks.quality.provenance import this_run
from benchmarks.quality.recall.measure import KEEP, RERANK, Outcome, Talker, by_method
from benchmarks.quality.scoring import Difference, wilson

NAME = "recall.json"
# Turns behind a picture's first, and those that bring another picture.
FOLLOW_UPS = (SAME, OTHER, BESIDE_IT)
KINDS = (*FOLLOW_UPS, NEW_PICTURE)
# Of a layer's weights, the share that projects keys: what ranking a token costs, in rows of a layer.
RANKED_ROWS = 0.1


def summarise(outcomes: Sequence[Outcome]) -> list[dict]:
    """A row per budget and method, in JSON's types."""
    methods = by_method(outcomes)
    rows = []
    for (budget, method), found in methods.items():
        rows.append(
            {
                "budget": budget,
                "method": method,
                "kinds": {kind: _score([o for o in found if o.kind == kind]) for kind in KINDS},
                "cost": _cost(found),
                "held": _held(found),
                "against": {
                    other: {
                        kind: _difference(found, methods[budget, other], kind) for kind in KINDS
                    }
                    for other in (KEEP, RERANK)
                    if (budget, other) in methods
                },
            }
        )
    return rows


def _score(found: Sequence[Outcome]) -> dict:
    right = sum(outcome.right for outcome in found)
    return {
        "right": right,
        "asked": len(found),
        "interval": wilson(right, len(found)) if found else None,
    }


def _cost(found: Sequence[Outcome]) -> dict:
    """Means over follow-ups, up to the first token: rows times layers, and keys projected only to be ranked."""
    later = [outcome for outcome in found if outcome.kind in FOLLOW_UPS]
    rows, ranked = (
        sum(getattr(outcome, name) for outcome in later) / len(later) for name in ("rows", "ranked")
    )
    return {"rows": rows, "ranked": ranked, "work": rows + RANKED_ROWS * ranked}


def _held(found: Sequence[Outcome]) -> float:
    """Entries in all layers at a conversation's end, mean."""
    last = {outcome.conversation: outcome.held for outcome in found}
    return sum(last.values()) / len(last)


def _difference(first: Sequence[Outcome], second: Sequence[Outcome], kind: str) -> dict:
    pairs = [(a.right, b.right) for a, b in zip(first, second, strict=True) if a.kind == kind]
    difference = Difference(
        pairs=len(pairs),
        only_first=sum(a and not b for a, b in pairs),
        only_second=sum(b and not a for a, b in pairs),
    )
    if not pairs:
        return asdict(difference)
    return asdict(difference) | {
        "value": difference.value,
        "interval": difference.interval,
        "p_value": difference.p_value,
    }


def markdown(rows: Sequence[Mapping]) -> Iterator[str]:
    yield f"| budget | method | {' | '.join(KINDS)} | other, against keep | against rerank | work | held |"
    yield "|---|---|" + "---|" * (len(KINDS) + 4)
    for row in rows:
        budget = "-" if row["budget"] is None else f"{100 * row['budget']:g} %"
        cells = [_share(row["kinds"][kind]) for kind in KINDS]
        cells += [_points(row["against"].get(other, {}).get(OTHER)) for other in (KEEP, RERANK)]
        cells += [f"{row['cost']['work']:,.0f}", f"{row['held']:,.0f}"]
        yield f"| {budget} | {row['method']} | {' | '.join(cells)} |"


def _share(score: Mapping) -> str:
    if not score["asked"]:
        return "-"
    low, high = (100 * end for end in score["interval"])
    return f"{100 * score['right'] / score['asked']:.1f} ({low:.1f} to {high:.1f})"


def _points(difference: Mapping | None) -> str:
    if not difference or not difference["pairs"]:
        return "-"
    low, high = (100 * end for end in difference["interval"])
    return f"{100 * difference['value']:+.1f} ({low:+.1f} to {high:+.1f}), p {difference['p_value']:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint (default: ours)")
    parser.add_argument("--count", type=int, default=1000, help="conversations (default: 1000)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder (default: here)")
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"--count {args.count} must be 1 or more.")
    torch.set_num_threads(1)
    talker = Talker(args.model)
    outcomes: list[Outcome] = []
    talks = tqdm(conversations("test", args.count), total=args.count, unit="conversation")
    for number, talk in enumerate(talks):
        outcomes += talker.outcomes(number, talk)
    write(outcomes, args.model, args.out)


def write(outcomes: Sequence[Outcome], model: Path, out: Path) -> None:
    rows = summarise(outcomes)
    count = len({outcome.conversation for outcome in outcomes})
    about = {"model": fingerprint(model), "conversations": count, "run": this_run()}
    lines = ",\n".join(map(json.dumps, rows))
    text = f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n'
    out.mkdir(parents=True, exist_ok=True)
    (out / NAME).write_text(text, encoding="utf-8")
    print("\n".join(markdown(rows)))


if __name__ == "__main__":
    main()
