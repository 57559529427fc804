"""The report on conversations: figures as JSON, Markdown tables and a plot."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.grounding.conversations import TURN_KINDS
from benchmarks.quality.conversations.rows import GAP, KEEP, RECALL, REMOVE, RERANK
from benchmarks.quality.methods import DENSE
from benchmarks.quality.plot import curves
from benchmarks.quality.report import difference_cells, write_texts

JSON_NAME, MARKDOWN_NAME, PLOT = "conversations.json", "conversations.md", "conversations.svg"
STYLES = {
    RERANK: {"color": "#d62728", "linestyle": "-", "marker": "o"},
    KEEP: {"color": "#1f77b4", "linestyle": "-", "marker": "D"},
    RECALL: {"color": "#2ca02c", "linestyle": "-", "marker": "^"},
    REMOVE: {"color": "#1f77b4", "linestyle": "--", "marker": "s"},
}
OTHER_STYLE = {"color": "#9467bd", "linestyle": "-.", "marker": "P"}

READING = """\
Conversations of two to four turns about one picture, a quarter of them with a second one. `first` opens one; `same`
asks for the label or the place of the thing that the question before named, as "it"; `beside it` asks what is next to
that; `other` is a question of any kind about other things in the picture; `new picture` comes with one. Each turn is
asked behind the server's own earlier answers, right or wrong. Schedule `pdrop`, pictures' tokens on the average as
said; `rerank`, `keep` and `recall` are values of `--reroute-history`. Prefix cache on, everywhere. Exact answers in %,
with 95 % Wilson intervals."""
PAIRED = """\
The same questions to both servers. Difference of accuracies in percentage points with the 95 % interval of a paired
bootstrap over questions; "only" counts questions that just one of the two got right, p is the exact McNemar test's.
No correction for the number of comparisons; questions of one conversation are taken for independent of each other."""
CLOSED = """\
What `{middle}` has over `{low}`, in % of what `{high}` has over it, with the 95 % interval of a bootstrap over
questions that draws all three servers' answers together. A dash where that of `{high}` is not surely above nothing.
First turns are the same for all."""


def write(found: dict, folder: Path) -> list[Path]:
    """Writes all files of the report, and returns where they are."""
    texts = write_texts(found, markdown(found), folder / JSON_NAME, folder / MARKDOWN_NAME)
    return [*texts, draw(found, folder / PLOT)]


def markdown(found: dict) -> Iterator[str]:
    yield "# Answers in conversations\n"
    yield from _about(found)
    if not found["complete"]:
        yield "\n**Incomplete.** Run it again: finished conversations are kept, the others held again."
        for name, reason in found["not_run"].items():
            yield f"- `{name}` was not run: {reason}"
    yield f"\n{READING}\n\n![Exact answers against visual tokens, by kind of turn]({PLOT})"
    yield "\n## By kind of turn\n"
    yield from _scores(found, "by_kind", TURN_KINDS)
    yield "\n## By number of the turn\n"
    numbers = list(dict.fromkeys(number for row in found["rows"] for number in row["by_turn"]))
    yield from _scores(found, "by_turn", numbers)
    yield f"\n## Set against each other\n\n{PAIRED}\n"
    yield from _comparisons(found)
    yield from _gaps(found)


def _about(found: dict) -> Iterator[str]:
    model, questions = found["model"], found["questions"]
    yield "| | |\n|---|---|"
    if model:
        yield (
            f"| model | `{model['model_name']}` ({model['model'][:12]}), {model['decoder_layers']} decoder layers, "
            f"{model['visual_tokens']} visual tokens a picture, {model['dtype']} |"
        )
    yield (
        f"| conversations | {questions['conversations']:,} of split `{questions.get('split')}`, "
        f"{questions['count']:,} questions, the same for all; at most {questions.get('max_tokens')} tokens, "
        f"temperature {questions.get('temperature')} |"
    )
    for key, values in found["ran"].items():
        shown = f"{values[0]} to {values[-1]}" if key == "date" and len(values) > 1 else None
        yield f"| {key} | {shown or ', '.join(values)} |"
    failed = sum(row["failed"] for row in found["rows"])
    asked = sum(row["failed"] + row["answered"] for row in found["rows"])
    yield f"| requests | {asked:,} questions asked, {failed:,} without an answer |"


def _scores(found: dict, by: str, columns) -> Iterator[str]:
    yield f"| server | budget | visual tokens | all | {' | '.join(columns)} |"
    yield "|---|---|---|---|" + "---|" * len(columns)
    for row in found["rows"]:
        status = "" if row["status"] == "complete" else f" **{row['status']}**"
        cells = [
            row["method"] + status,
            "-" if row["budget"] is None else f"{100 * row['budget']:.0f} %",
            f"{row['average']:.1f} ({100 * row['share']:.1f} %)",
            _accuracy(row),
            *(_accuracy(row[by][column]) for column in columns),
        ]
        yield f"| {' | '.join(cells)} |"
    if found["rows"]:
        most = {c: max(row[by][c]["answered"] for row in found["rows"]) for c in columns}
        yield "\nQuestions: " + ", ".join(f"{c} {count:,}" for c, count in most.items()) + "."


def _accuracy(score: Mapping) -> str:
    if score["accuracy"] is None:
        return "-"
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _comparisons(found: dict) -> Iterator[str]:
    yield (
        "| first - second | budget | turns | difference, points | only first | only second | p | questions |"
        "\n|---|---|---|---|---|---|---|---|"
    )
    for each in found["comparisons"]:
        cells = [
            f"{each['first']} - {each['second']}",
            f"{100 * each['budget']:.0f} %",
            each["kind"],
            *difference_cells(each),
        ]
        yield f"| {' | '.join(cells)} |"


def _gaps(found: dict) -> Iterator[str]:
    if not found["gaps"]:
        return
    low, middle, high = GAP
    yield f"\n## Share of the gap closed\n\n{CLOSED.format(low=low, middle=middle, high=high)}\n"
    kinds = list(dict.fromkeys(each["kind"] for each in found["gaps"]))
    yield f"| budget | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}"
    at = {(each["budget"], each["kind"]): each for each in found["gaps"]}
    for budget in dict.fromkeys(budget for budget, _ in at):
        cells = [f"{100 * budget:.0f} %", *(_closed(at.get((budget, kind))) for kind in kinds)]
        yield f"| {' | '.join(cells)} |"


def _closed(gap: Mapping | None) -> str:
    if gap is None or gap["share"] is None:
        return "-"
    low, high = gap["interval"]
    return f"{100 * gap['share']:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def draw(found: dict, path: Path) -> Path:
    """A panel per kind of turn; the same results give the same file."""
    with rc_context({"svg.hashsalt": "conversations", "font.size": 8}):
        figure = Figure(figsize=(10, 2.6), layout="constrained")
        for axes, kind in zip(
            figure.subplots(1, len(TURN_KINDS), sharey=True), TURN_KINDS, strict=True
        ):
            _draw_kind(axes, found["rows"], kind)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside upper center", ncols=5)
        figure.supxlabel("visual tokens per decoder layer, average")
        figure.axes[0].set_ylabel("exact, % (95 % Wilson)")
        figure.savefig(path, metadata={"Date": None})
    return path


def _draw_kind(axes, rows, kind: str) -> None:
    for method, averages, middles, around in curves([(row, row["by_kind"][kind]) for row in rows]):
        if method == DENSE:
            axes.axhline(middles[0], color="black", linewidth=0.8, linestyle=":", label="stock")
            continue
        axes.errorbar(
            averages, middles, around, label=method, capsize=2, linewidth=1.2,
            markersize=3, elinewidth=0.8, **STYLES.get(method, OTHER_STYLE),
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(-2, 102)
    axes.set_title(kind, fontsize=8)
    axes.grid(alpha=0.25)
