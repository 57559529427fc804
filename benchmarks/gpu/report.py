"""One report of all records there are: `gpu.json` and `gpu.md`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import STEPS

TRIAL = "**This is a trial on CPU with tiny shapes: it shows that the steps run. Its numbers mean nothing.**"
SPEED = (
    ("first_token_image_ms", "first token, image, ms"),
    ("first_token_text_ms", "first token, text, ms"),
    ("decode_step_1_ms", "decode step of 1, ms"),
    ("decode_step_8_ms", "of 8"),
    ("decode_step_32_ms", "of 32"),
    ("requests_per_s_1", "requests/s at 1"),
    ("requests_per_s_8", "at 8"),
    ("requests_per_s_32", "at 32"),
)


def write_report(folder: Path) -> None:
    """From `folder`/records; steps in their order."""
    records = {}
    for step in STEPS:
        path = folder / "records" / f"{step.name}.json"
        if path.exists():
            records[step.name] = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps(records, indent=1)
    (folder / "gpu.json").write_text(text, encoding="utf-8")
    (folder / "gpu.md").write_text(markdown(records), encoding="utf-8")


def markdown(records: Mapping[str, Mapping[str, Any]]) -> str:
    """records: by step."""
    environment = records.get("environment", {})
    lines = ["# vllm-reroute on a GPU", ""]
    if any(record["trial"] for record in records.values()):
        lines += [TRIAL, ""]
    facts = {
        "card": environment.get("card"),
        "machine": environment.get("machine"),
        "CUDA": environment.get("cuda"),
        "bf16 TFLOP/s": environment.get("bf16_tflops"),
        **environment.get("run", {}),
        **environment.get("versions", {}),
    }
    lines += [f"- {name}: {value}" for name, value in facts.items() if value]
    lines += ["", "## Is it right", "", *_table(("step", "seconds", "", "found"), _checks(records))]
    speed = [
        (name, *(_number(record.get(key)) for key, _ in SPEED))
        for name, record in records.items()
        if "first_token_image_ms" in record
    ]
    if speed:
        heads = ("step", *(title for _, title in SPEED))
        lines += ["", "## How fast it is", "", "Medians; weights are dummies.", ""]
        lines += _table(heads, speed)
    errors = {name: record["error"] for name, record in records.items() if "error" in record}
    for name, error in errors.items():
        lines += ["", f"## {name}", "", "```", error.strip(), "```"]
    return "\n".join(lines) + "\n"


def _checks(records: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple]:
    shown = (
        "tokens_equal",
        "decisions_equal",
        "worst_logprob_gap",
        "tables_equal_to_torch",
        "waits_for_device",
        "waits",
        "same_tokens",
        "same_decisions",
        "requests",
    )
    for name, record in records.items():
        verdict = {True: "passed", False: "**failed**", None: "**not finished**"}[record["passed"]]
        found = [
            f"{key.replace('_', ' ')} {record[key]}"
            for key in shown
            if not isinstance(record.get(key), list | dict | None)
        ]
        if record.get("waits"):
            found.append(f"waits at {', '.join(record['waits'])}")
        yield name, record.get("seconds", ""), verdict, "; ".join(found)


def _number(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = value["median"]
    return "" if value is None else f"{value:g}"


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    heads = tuple(heads)
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]
