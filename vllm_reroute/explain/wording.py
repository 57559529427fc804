"""What the pictures and the page say, in one place, so that they say the same."""

from __future__ import annotations

from vllm_reroute.explain.explanation import Explanation
from vllm_reroute.explain.trace import TracedStage, average_kept


def stage_title(index: int, stage: TracedStage) -> str:
    """Number and layers of a stage."""
    first, end = stage.layers
    layers = f"layer {first}" if end - first == 1 else f"layers {first}-{end - 1}"
    return f"Stage {index} · {layers}"


def stage_counts(explanation: Explanation, stage: TracedStage) -> str:
    """How many run, wait and came back."""
    num = explanation.trace.num_visual
    if not stage.num_deferred:
        return f"all {num} visual tokens run"
    counts = f"{stage.num_kept} of {num} run, {stage.num_deferred} {away(explanation)}"
    return counts + (f", {stage.num_brought_back} came back" if stage.num_brought_back else "")


def away(explanation: Explanation) -> str:
    """What a token is that does not run."""
    return "removed" if explanation.removes else "deferred"


def summary(explanation: Explanation) -> str:
    """The request and what it kept, in one sentence."""
    trace = explanation.trace
    average = average_kept(trace)
    return (
        f"{trace.num_visual} visual tokens of {trace.num_prompt} in the prompt; "
        f"{average:.1f} run in a layer on average ({average / trace.num_visual:.0%})"
    )
