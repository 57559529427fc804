"""Asks all questions of every configuration, one server after another."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import openai
from tqdm import tqdm

from benchmarks.quality.asking import SAMPLING, Endpoint, Outcome, Prompt, ask_all
from benchmarks.quality.methods import Configuration
from benchmarks.quality.outcomes import OutcomeFile
from benchmarks.quality.provenance import this_run
from benchmarks.quality.results import check_folder
from benchmarks.quality.serving import Serving

SPLIT = "test"


class Progress:
    """One bar over all questions of all configurations. What servers say while starting is shown beside it."""

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, unit="question", dynamic_ncols=True, smoothing=0.05)
        self._failed = 0

    def begin(self, name: str) -> None:
        self._bar.set_description(name)

    def skip(self, count: int) -> None:
        """Questions that cannot be asked now."""
        self._bar.total -= count
        self._bar.set_postfix_str("", refresh=False)
        self._bar.refresh()

    def add(self, outcome: Outcome) -> None:
        self._failed += outcome.failed
        self._bar.set_postfix_str(f"{self._failed} failed" if self._failed else "", refresh=False)
        self._bar.update()

    def say(self, line: str) -> None:
        self._bar.write(line, file=sys.stderr)

    @contextlib.contextmanager
    def server_lines(self) -> Iterator[None]:
        """Lines a starting server's program prints to standard error go into the bar."""
        with contextlib.redirect_stderr(_Lines(self._bar.set_postfix_str)):
            yield

    def close(self) -> None:
        self._bar.set_postfix_str("")
        self._bar.close()


class _Lines(io.TextIOBase):
    def __init__(self, show: Callable[[str], object]) -> None:
        self._show = show

    def write(self, text: str) -> int:
        if text.strip():
            self._show(re.sub(r"^\[[\w ]+\] ", "", text.strip()))
        return len(text)


# Gets each outcome as soon as it is there.
Record = Callable[[Outcome], None]
# Asks an endpoint the questions of those numbers, so many requests at once.
AskMissing = Callable[[Endpoint, Sequence[int], int, Record], None]


def run(
    wanted: Sequence[Configuration],
    prompts: Sequence[Prompt],
    serving: Serving,
    fingerprint: str,
    folder: Path,
) -> dict[str, str]:
    """Asks every prompt by itself; otherwise as `run_rows`."""
    return run_rows(wanted, prompts, one_by_one(prompts), serving, fingerprint, folder)


def one_by_one(prompts: Sequence[Prompt]) -> AskMissing:
    def ask(endpoint: Endpoint, missing: Sequence[int], concurrency: int, record: Record) -> None:
        ask_all(endpoint, [prompts[index] for index in missing], concurrency, record)

    return ask


def run_rows(
    wanted: Sequence[Configuration],
    prompts: Sequence[Prompt],
    ask: AskMissing,
    serving: Serving,
    fingerprint: str,
    folder: Path,
) -> dict[str, str]:
    """Asks what is missing in `folder`; returns the configurations that could not be asked, and why.

    fingerprint: of the model. Raises ValueError, before anything starts, if `folder` was recorded with something else.
    """
    digests = [prompt.digest for prompt in prompts]
    abouts = {each.name: identity(each, serving, fingerprint) for each in wanted}
    files = {
        name: OutcomeFile(folder / f"{name}.jsonl", about, digests)
        for name, about in abouts.items()
    }
    check_folder(folder, next(iter(abouts.values())), digests)
    progress = Progress(sum(len(file.missing()) for file in files.values()))
    not_run = {}
    try:
        for each in wanted:
            missing = files[each.name].missing()
            if not missing:
                continue
            progress.begin(each.name)
            try:
                with contextlib.ExitStack() as stack:
                    with progress.server_lines():
                        endpoint = stack.enter_context(serving.serve(each, prompts[0]))
                    ask_missing(
                        endpoint, files[each.name], ask, serving.concurrency, each.note, progress
                    )
            except (RuntimeError, ValueError, OSError, openai.OpenAIError) as error:
                progress.say(f"{each.name} was not run: {error}")
                # Lines above the last one name files of this machine.
                not_run[each.name] = str(error).strip().splitlines()[-1]
                progress.skip(len(missing))
    finally:
        progress.close()
    return not_run


def run_own_server(
    endpoint: Endpoint,
    label: str,
    average: float | None,
    prompts: Sequence[Prompt],
    concurrency: int,
    folder: Path,
) -> None:
    """Asks a server that is running already. average: visual tokens per decoder layer, where known."""
    about = {
        **_shared(),
        "model": None,
        "model_name": endpoint.model,
        "visual_tokens": None,
        "method": label,
        "budget": None,
        "average": average,
        "decision_layers": [],
        "kept": [],
        "arguments": [],
    }
    name = re.sub(r"[^\w.]+", "-", label).strip("-")
    digests = [prompt.digest for prompt in prompts]
    file = OutcomeFile(folder / f"own-{name}.jsonl", about, digests)
    check_folder(folder, about, digests)
    progress = Progress(len(file.missing()))
    progress.begin(label)
    try:
        ask_missing(
            endpoint,
            file,
            one_by_one(prompts),
            concurrency,
            f"a server of its own, model `{endpoint.model}`",
            progress,
        )
    finally:
        progress.close()


def ask_missing(
    endpoint: Endpoint,
    file: OutcomeFile,
    ask: AskMissing,
    concurrency: int,
    note: str,
    progress: Progress,
) -> None:
    """Asks what has no answer yet, and records every outcome at once."""
    missing = file.missing()
    if not missing:
        return
    file.start_run(this_run() | {"note": note})

    def record(outcome: Outcome) -> None:
        file.add(outcome)
        progress.add(outcome)

    ask(endpoint, missing, concurrency, record)


def identity(configuration: Configuration, serving: Serving, fingerprint: str) -> dict:
    """Everything an outcome depends on, but its question."""
    row = configuration.as_row()
    del row["note"], row["grid"]
    return {
        **_shared(),
        "model": fingerprint,
        "model_name": serving.model.name,
        "visual_tokens": serving.shape.visual_tokens,
        "decoder_layers": serving.shape.decoder_layers,
        "dtype": serving.dtype,
        **row,
    }


def _shared() -> dict:
    return {"split": SPLIT, **SAMPLING}
