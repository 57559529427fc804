"""Calibrated schedules of the grounding model, for the quality table: every kind and budget it compares.

python -m benchmarks.grounding.calibrate

Questions are of the validation split. Rows are recorded once, into .local/calibration; solving all takes some minutes.
"""

import argparse
import datetime
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.grounding.calibration_samples import write
from benchmarks.grounding.evaluate import MODEL
from vllm_reroute.calibration.choice import Wish, choose
from vllm_reroute.calibration.confidence import expectations
from vllm_reroute.calibration.file import CalibratedSchedule, ModelIdentity
from vllm_reroute.calibration.objective import Looks
from vllm_reroute.calibration.published import published_schedules
from vllm_reroute.calibration.report import CHOSEN
from vllm_reroute.calibration.run import Settings, record
from vllm_reroute.calibration.samples import digest_of, read_samples
from vllm_reroute.command_line.calibrate import DEFAULT_OBJECTIVE
from vllm_reroute.schedule.published import Action

FOLDER = Path(__file__).resolve().parent / "calibrated"
COUNT = 198
PERCENT = (33, 22, 11, 5)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a calibrated schedule is to be, at any budget."""

    action: Action
    most_decisions: int
    monotone: bool = False

    def path(self, percent: float) -> Path:
        falling = "-falling" if self.monotone else ""
        return FOLDER / f"{self.action}-{self.most_decisions}{falling}-{percent:g}.json"


# As many decisions as the published schedules have: FastV removes once, PDrop four times, both reroute four times.
REMOVE_ONCE = Kind(action="remove", most_decisions=1)
REMOVE = Kind(action="remove", most_decisions=4)
REROUTE = Kind(action="reroute", most_decisions=4)
REROUTE_FALLING = Kind(action="reroute", most_decisions=4, monotone=True)
KINDS = (REMOVE_ONCE, REMOVE, REROUTE, REROUTE_FALLING)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path(".local/calibration"), help="for samples and rows"
    )
    args = parser.parse_args()
    samples = read_samples(write(args.work, "validation", COUNT))
    settings = Settings(
        model=str(MODEL),
        samples=args.work / "samples.jsonl",
        share=0.5,
        most_decisions=1,
        action="reroute",
        monotone=False,
        objective="attention",
        out=args.work / "grounding.json",
        plot=False,
        dtype="float32",
        device="cpu",
    )
    identity = _identity()
    rows = record(settings, identity, samples)
    FOLDER.mkdir(exist_ok=True)
    lines = []
    for kind, percent in tqdm([(k, p) for k in KINDS for p in PERCENT], unit="schedule"):
        wish = Wish(
            share=percent / 100,
            first_layer=1,
            most_decisions=kind.most_decisions,
            action=kind.action,
            monotone=kind.monotone,
        )
        objective = DEFAULT_OBJECTIVE[kind.action]
        looks = Looks.of(rows, objective, wish.first_layer)
        chosen = choose(looks, wish)
        published, _ = published_schedules(wish, looks.num_layers)
        expected = expectations(looks, {CHOSEN: chosen, **published})
        losses = {name: round(each.share, 4) for name, each in expected.items()}
        CalibratedSchedule(
            model=identity,
            action=chosen.action,
            layers=chosen.layers,
            keep=chosen.keep,
            about={
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "samples": {"count": len(samples), "sha256": digest_of(samples)},
                "objective": objective,
                "wanted_share": wish.share,
                "average_visual_tokens": chosen.average(looks.reference),
                "expected_loss": losses,
            },
        ).write(kind.path(percent))
        stages = zip(chosen.layers, chosen.kept_per_stage(looks.reference)[1:], strict=True)
        lines.append(
            f"{kind.path(percent).stem:22s} {' '.join(f'{d}:{k}' for d, k in stages):32s} {losses}"
        )
    print("\n".join(lines))


def _identity() -> ModelIdentity:
    from transformers import AutoConfig

    return ModelIdentity.of(str(MODEL), AutoConfig.from_pretrained(MODEL))


if __name__ == "__main__":
    main()
