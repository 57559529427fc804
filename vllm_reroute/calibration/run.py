"""`vllm-reroute calibrate`, from samples to file."""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vllm_reroute.calibration.choice import Wish, choose
from vllm_reroute.calibration.confidence import RESOLVES, expectations, held_out, recurrence
from vllm_reroute.calibration.file import CalibratedSchedule, ModelIdentity
from vllm_reroute.calibration.objective import Looks
from vllm_reroute.calibration.plot import draw
from vllm_reroute.calibration.published import published_schedules
from vllm_reroute.calibration.report import CHOSEN, Findings, report
from vllm_reroute.calibration.rows import NAMES, RowFolder
from vllm_reroute.calibration.samples import Sample, digest_of, prepare, read_samples
from vllm_reroute.families.deepstack import first_decision_layer
from vllm_reroute.families.short_names import resolve_model
from vllm_reroute.models.architecture import RoutedArchitecture
from vllm_reroute.schedule.published import Action

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EXTRA = "pip install 'vllm-reroute[calibrate]'"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """model: id, short name or folder. share: of visual tokens, the average over layers.

    out: the file to write; recorded rows and the plot lie beside it. plot: whether there is one.
    """

    model: str
    samples: Path
    share: float
    most_decisions: int
    action: Action
    monotone: bool
    objective: str
    out: Path
    plot: bool
    dtype: str
    device: str


def calibrate(settings: Settings) -> Iterator[str]:
    """Runs what has not been recorded, writes file and plot, and tells what was found.

    Raises ValueError for what cannot be done, before anything is run where that is known by then.
    """
    from transformers import AutoConfig

    _check_extras(settings.plot)
    if settings.out.suffix != ".json":
        raise ValueError(f"--out {settings.out} must end in .json.")
    if not settings.out.parent.is_dir():
        raise ValueError(f"--out {settings.out}: the folder {settings.out.parent} is not there.")
    config: PretrainedConfig = RoutedArchitecture(None)(
        AutoConfig.from_pretrained(resolve_model(settings.model))
    )
    samples = read_samples(settings.samples)
    wish = Wish(
        share=settings.share,
        first_layer=first_decision_layer(config),
        most_decisions=settings.most_decisions,
        action=settings.action,
        monotone=settings.monotone,
    )
    identity = ModelIdentity.of(settings.model, config)
    rows = record(settings, identity, samples)
    looks = Looks.of(rows, settings.objective, wish.first_layer)
    findings = solve(looks, wish, settings.objective)
    chosen = findings.expected[CHOSEN].schedule
    calibrated = CalibratedSchedule(
        model=identity,
        action=chosen.action,
        layers=chosen.layers,
        keep=chosen.keep,
        about={
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "samples": {"count": len(samples), "sha256": digest_of(samples)},
            **findings.as_numbers(),
        },
    )
    calibrated.write(settings.out)
    yield from report(findings, calibrated, str(settings.out))
    yield ""
    yield f"Written: {settings.out}"
    if settings.plot:
        path = settings.out.with_suffix(".svg")
        draw(looks, {name: each.schedule for name, each in findings.expected.items()}, path)
        yield f"         {path}"
    yield f"         {rows_folder(settings.out)}/ (recorded rows; other budgets start from them)"


def rows_folder(out: Path) -> Path:
    """Where the rows recorded for a result are kept."""
    return out.with_suffix(".rows")


def record(
    settings: Settings, identity: ModelIdentity, samples: Sequence[Sample]
) -> list[dict[str, np.ndarray]]:
    """The rows of all samples; those the folder has are not run again."""
    folder = RowFolder(rows_folder(settings.out), {**asdict(identity), "dtype": settings.dtype})
    missing = [sample for sample in samples if folder.load(sample.digest) is None]
    if missing:
        _run(settings, folder, missing)
    return [_recorded(folder, sample) for sample in samples]


def _recorded(folder: RowFolder, sample: Sample) -> dict[str, np.ndarray]:
    rows = folder.load(sample.digest)
    assert rows is not None, "what was missing has been recorded"
    return rows


def _run(settings: Settings, folder: RowFolder, samples: Sequence[Sample]) -> None:
    from tqdm import tqdm
    from transformers import AutoProcessor

    from vllm_reroute.calibration.recording import Recorder

    model = resolve_model(settings.model)
    processor = AutoProcessor.from_pretrained(model)
    recorder = Recorder(model, settings.dtype, settings.device)
    for sample in tqdm(samples, desc="recording", unit="sample"):
        try:
            rows = recorder.record(prepare(sample, processor))
        except ValueError as error:
            raise ValueError(
                f"--samples {settings.samples}, line {sample.line}: {error}"
            ) from error
        folder.save(sample.digest, **{name: getattr(rows, name) for name in NAMES})


def solve(looks: Looks, wish: Wish, objective: str) -> Findings:
    """The best schedule, what it and the published ones lose, and how sure that is."""
    from tqdm import tqdm

    with tqdm(total=2 + RESOLVES, desc="solving", unit="choice") as bar:
        chosen = choose(looks, wish)
        bar.update()
        halves = held_out(looks, wish)
        bar.update()
        recurring = recurrence(looks, wish, chosen, bar.update)
    published, left_out = published_schedules(wish, looks.num_layers)
    return Findings(
        wish=wish,
        objective=objective,
        num_samples=len(looks.sizes),
        reference=looks.reference,
        expected=expectations(looks, {CHOSEN: chosen, **published}),
        left_out=left_out,
        halves=halves,
        recurrence=recurring,
    )


def _check_extras(plot: bool) -> None:
    """Before hours are spent: is everything there?"""
    if importlib.util.find_spec("tqdm") is None:
        raise ValueError(f"the progress bar needs tqdm: {EXTRA}")
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"the plot needs matplotlib: {EXTRA}, or leave it out with --no-plot.")
