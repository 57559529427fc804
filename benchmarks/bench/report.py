"""The report: everything measured so far as JSON, Markdown and plots."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.bench import store, targets
from benchmarks.bench.parts import PARTS

JSON_NAME, MARKDOWN_NAME = "bench.json", "bench.md"
HEAD = """\
Routed engines against stock vLLM in the same run. Engines are processes of their own that take turns, one active at a
time; the first round is discarded. Numbers are medians over rounds, with the range in brackets; every ratio is formed
within a round and then summarised, so that a round in which the machine was slow cancels out. Models are seeded and
random: they show what the mechanism costs and saves at their size, and predict no other machine's times."""


def collect(folder: Path) -> dict:
    """The report's content, from the waves in the folder."""
    parts, entries = {}, []
    for name, part in PARTS.items():
        measured = {}
        for path in sorted(folder.glob(f"{name}.*.json"), key=lambda path: path.stat().st_mtime):
            entry = store.read(path)
            measured[path.stem.partition(".")[2]] = entry["measured"]
            entries.append({"wave": path.stem, "identity": entry["identity"], "run": entry["run"]})
        if measured:
            parts[name] = {"title": part.TITLE, "waves": list(measured), **part.summarise(measured)}
    found = [target for part in parts.values() for target in part["targets"]]
    return {
        "ran": entries,
        "targets": found,
        "missed": sum(not target["met"] for target in found),
        "parts": parts,
    }


def write(found: dict, folder: Path) -> list[Path]:
    """Writes all files, and returns where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_markdown = folder / JSON_NAME, folder / MARKDOWN_NAME
    as_json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    as_markdown.write_text("\n".join(markdown(found)) + "\n", encoding="utf-8")
    plots = [
        path for name, part in found["parts"].items() for path in PARTS[name].draw(part, folder)
    ]
    return [as_json, as_markdown, *plots]


def markdown(found: dict) -> Iterator[str]:
    yield "# Benchmarks\n"
    yield HEAD + "\n"
    yield from _ran(found["ran"])
    if found["not_finished"]:
        yield "\n**Incomplete.** Run it again: finished waves are kept."
        for wave, reason in found["not_finished"].items():
            yield f"- `{wave}`: {reason}"
    yield "\n## Targets\n"
    count = len(found["targets"])
    yield f"{count - found['missed']} of {count} met.\n"
    yield from targets.table(found["targets"])
    for name, part in found["parts"].items():
        yield f"\n## {part['title']}\n"
        yield from PARTS[name].markdown(part)


def _ran(entries: list[Mapping]) -> Iterator[str]:
    """Every value of provenance that occurs; results of different code or settings are pointed at."""
    yield "| | |\n|---|---|"
    # The device names the processor too.
    for key in dict.fromkeys(key for e in entries for key in e["run"] if key != "cpu"):
        values = dict.fromkeys(str(entry["run"][key]) for entry in entries if key in entry["run"])
        yield f"| {key} | {'; '.join(values)} |"
    for key in ("device", "threads", "dtype", "eager", "rounds", "model"):
        values = dict.fromkeys(str(entry["identity"].get(key)) for entry in entries)
        yield f"| {key} | {'; '.join(values)} |"
    identities = {json.dumps(entry["identity"], sort_keys=True) for entry in entries}
    if len(identities) > 1:
        yield "\n**Mixed.** Waves of this report were measured with different code or settings:"
        for entry in entries:
            run, identity = entry["run"], entry["identity"]
            yield f"- `{entry['wave']}`: {run['date']}, commit {run['commit']}, sources {identity['sources']}"
