"""What a calibration found, in lines for a terminal and in numbers for the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_reroute.calibration.choice import Wish
from vllm_reroute.calibration.confidence import Expected, HeldOut
from vllm_reroute.calibration.file import CalibratedSchedule

CHOSEN = "chosen"

WORTH = {
    "attention": "the last prompt token's attention to visual tokens",
    "contribution": "what visual tokens add to the last prompt token's stream",
    "lasting": "what visual tokens add to the last prompt token's stream, now or later,",
}


@dataclass(frozen=True, kw_only=True)
class Findings:
    """expected: by schedule, the chosen one first. left_out: published schedules not compared, and
    why. recurrence: decision layer -> share of resamples. reference: visual tokens counts are of."""

    wish: Wish
    objective: str
    num_samples: int
    reference: int
    expected: Mapping[str, Expected]
    left_out: Mapping[str, str]
    halves: Sequence[HeldOut]
    recurrence: Mapping[int, float]

    def as_numbers(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "objective": self.objective,
            "wanted_share": self.wish.share,
            "most_decisions": self.wish.most_decisions,
            "monotone": self.wish.monotone or self.wish.action == "remove",
            "reference_visual_tokens": self.reference,
            "average_visual_tokens": self.expected[CHOSEN].schedule.average(self.reference),
            "expected_loss": {
                name: {
                    "layers": list(each.schedule.layers),
                    "keep": list(each.schedule.keep),
                    "share": each.share,
                    "interval": list(each.interval),
                }
                for name, each in self.expected.items()
            },
            "halves": [{"other": half.other, "own": half.own} for half in self.halves],
            "recurrence": {str(layer): share for layer, share in self.recurrence.items()},
        }


def report(findings: Findings, calibrated: CalibratedSchedule, path: str) -> Iterator[str]:
    """Lines for the user."""
    wish, expected = findings.wish, findings.expected
    chosen = expected[CHOSEN].schedule
    yield (
        f"{findings.num_samples} samples, at most {wish.most_decisions} decision"
        f"{'s' * (wish.most_decisions > 1)}, action {wish.action}, {wish.share:.1%} of the visual "
        f"tokens per layer ({chosen.average(findings.reference):.2f} of {findings.reference})"
    )
    yield ""
    yield f"Expected loss: share of {WORTH[findings.objective]}"
    yield "that falls on tokens which do not run, over all layers (95 % bootstrap interval)."
    yield ""
    width = max(map(len, expected))
    yield f"{'schedule':<{width}}  loss                     more than chosen          average  layers: kept"
    for name, each in expected.items():
        kept = each.schedule.kept_per_stage(findings.reference)[1:]
        stages = " ".join(f"{d}:{k}" for d, k in zip(each.schedule.layers, kept, strict=True))
        more = "-" if name == CHOSEN else _interval(each.difference, each.difference_interval)
        average = each.schedule.average(findings.reference)
        yield (
            f"{name:<{width}}  {_interval(each.share, each.interval):<24} {more:<24} "
            f"{average:>8.2f}  {stages}"
        )
    for name, reason in findings.left_out.items():
        yield f"{name:<{width}}  not compared: {reason}"
    yield ""
    yield "How sure:"
    for number, half in enumerate(findings.halves, 1):
        yield (
            f"  half {number}: what the other half chooses loses {half.other:.1%} of it, its own "
            f"choice {half.own:.1%}"
        )
    for layer, share in findings.recurrence.items():
        yield f"  a decision at layer {layer}, or one beside it, in {share:.0%} of resampled choices"
    yield ""
    yield "Serve it with"
    yield f"  --reroute-file {path}"
    yield "or, without its check of the model,"
    yield f"  {calibrated.flags}"


def _interval(middle: float, ends: tuple[float, float]) -> str:
    return f"{middle:.1%} ({ends[0]:.1%} to {ends[1]:.1%})"
