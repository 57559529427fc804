"""The report: results as JSON, Markdown tables and plots."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from benchmarks.quality import layer_choice, looks
from benchmarks.quality.plot import PLOT, PLOT_BY_KIND, draw

JSON_NAME, MARKDOWN_NAME = "quality.json", "quality.md"

READING = """\
Accuracy is the share of answered questions whose answer matches exactly (surrounding space, case and a final full stop
aside); failed requests are never scored. Intervals are 95 % Wilson intervals. "Visual tokens" is the true average per
decoder layer: computed from the schedule, and equal to what the server printed when it started. "Tokens kept" are
those of every stage, the first one included; decision layers count from 0."""
PAIRED = """\
Both were asked the same questions. Difference of accuracies in percentage points, with the 95 % interval of a paired
bootstrap over questions; "only" counts questions that just one of the two got right, and p is the exact McNemar
test's. No correction for the number of comparisons."""
DOWNSAMPLED = """\
`downsample` is the same checkpoint on a smaller image with resampled position embeddings, untrained for it."""


def write(found: dict, folder: Path) -> list[Path]:
    """Writes all files of the report, and returns where they are."""
    texts = write_texts(found, markdown(found), folder / JSON_NAME, folder / MARKDOWN_NAME)
    return [*texts, *draw(found, folder)]


def write_texts(
    found: dict, lines: Iterable[str], as_json: Path, as_markdown: Path
) -> tuple[Path, Path]:
    """Writes figures, and the Markdown made of them; returns where they are."""
    as_json.parent.mkdir(parents=True, exist_ok=True)
    as_json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    as_markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return as_json, as_markdown


def difference_cells(each: Mapping) -> list[str]:
    """Of a table row about two that are set against each other: all but who they are."""
    low, high = (100 * end for end in each["interval"])
    return [
        f"{100 * each['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
        str(each["only_first"]),
        str(each["only_second"]),
        "< 0.0001" if each["p_value"] < 1e-4 else f"{each['p_value']:.4f}",
        f"{each['pairs']:,}" + ("" if each["complete"] else " **incomplete**"),
    ]


def markdown(found: dict) -> Iterator[str]:
    yield "# Answer quality\n"
    yield from _about(found)
    if not found["complete"]:
        yield "\n**Incomplete.** Run it again: finished questions are kept, the others asked again."
        for name, reason in found["not_run"].items():
            yield f"- `{name}` was not run: {reason}"
    yield f"\n![Accuracy against visual tokens]({PLOT})\n"
    yield READING + "\n"
    yield from _accuracies(found)
    yield "\n## Set against each other\n"
    yield PAIRED + "\n"
    yield from _comparisons(found)
    yield from looks.markdown(found["looks"])
    yield from layer_choice.markdown(found["squares"])
    yield "\n## By kind of question\n"
    yield f"![The same by kind]({PLOT_BY_KIND})\n"
    yield from _by_kind(found)


def _about(found: dict) -> Iterator[str]:
    model, questions, ran = found["model"], found["questions"], found["ran"]
    yield "| | |\n|---|---|"
    if model:
        yield (
            f"| model | `{model['model_name']}` ({model['model'][:12]}), {model['decoder_layers']} decoder layers, "
            f"{model['visual_tokens']} visual tokens, {model['dtype']} |"
        )
    yield (
        f"| questions | {questions['count']:,} of split `{questions.get('split')}`, the same for all; at most "
        f"{questions.get('max_tokens')} tokens, temperature {questions.get('temperature')} |"
    )
    for key, values in ran.items():
        shown = f"{values[0]} to {values[-1]}" if key == "date" and len(values) > 1 else None
        yield f"| {key} | {shown or ', '.join(values)} |"
    failed = sum(row["failed"] for row in found["configurations"])
    asked = sum(row["failed"] + row["answered"] for row in found["configurations"])
    yield f"| requests | {asked:,} questions asked, {failed:,} without an answer |"


def _accuracies(found: dict) -> Iterator[str]:
    yield (
        "| method | budget | visual tokens | share | decision layers | tokens kept | correct | accuracy, % "
        "| failed | notes |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    notes: dict[str, int] = {}
    for row in found["configurations"]:
        note = f"[{notes.setdefault(row['note'], len(notes) + 1)}]" if row["note"] else ""
        status = "" if row["status"] == "complete" else f" **{row['status']}**"
        cells = [
            row["method"],
            _percent(row["budget"], 0),
            _number(row["average"]),
            _percent(row["share"]),
            ", ".join(map(str, row["decision_layers"])) or "-",
            ", ".join(map(str, row["kept"])) or "-",
            f"{row['correct']:,} / {row['answered']:,}",
            f"{_percent(row['accuracy'])} ({_interval(row['interval'])})",
            str(row["failed"]),
            note + status,
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield from (f"[{number}] {note}.  " for note, number in notes.items())
    if any(row["method"] == "downsample" for row in found["configurations"]):
        yield "\n" + DOWNSAMPLED


def _comparisons(found: dict) -> Iterator[str]:
    yield (
        "| first - second | budget | visual tokens | difference, points | only first | only second | p | questions |"
        "\n|---|---|---|---|---|---|---|---|"
    )
    for each in found["comparisons"]:
        cells = [
            f"{each['first']} - {each['second']}",
            _percent(each["budget"], 0),
            " / ".join(map(_number, each["averages"])),
            *difference_cells(each),
        ]
        yield f"| {' | '.join(cells)} |"


def _by_kind(found: dict) -> Iterator[str]:
    rows = found["configurations"]
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["by_kind"]))
    yield f"Accuracy in %.\n\n| method | budget | visual tokens | {' | '.join(kinds)} |"
    yield "|---|---|---|" + "---|" * len(kinds)
    for row in rows:
        cells = [row["method"], _percent(row["budget"], 0), _number(row["average"])]
        cells += [_percent(row["by_kind"].get(kind, {}).get("accuracy"), 0) for kind in kinds]
        yield f"| {' | '.join(cells)} |"
    counts = {kind: max(_answered(row, kind) for row in rows) for kind in kinds}
    shown = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    yield f"\nQuestions of each kind: {shown}. Intervals are in `{JSON_NAME}` and in the plot."


def _answered(row: dict, kind: str) -> int:
    return row["by_kind"].get(kind, {}).get("answered", 0)


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _interval(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"
