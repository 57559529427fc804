"""What a runner hands to the metadata builders in a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_reroute.plan.step_plan import StepPlan


@dataclass
class RoutedStep:
    """One step of a routed model; `StepTables` have been filled for it.

    plan: None in a dummy run, which routes nothing and writes nowhere. fetched_positions: [n] or
    [3, n] int64, rope positions of the tokens the plan fetches; None where it fetches none. built:
    what backends have made of the step's lengths, by the first stage that has them. common: the
    runner's metadata, as the first builder of the step was handed it.
    """

    plan: StepPlan | None
    fetched_positions: torch.Tensor | None = None
    built: dict[int, Any] = field(default_factory=dict)
    common: CommonAttentionMetadata | None = None


DUMMY_STEP = RoutedStep(None)


def real_step(step: RoutedStep | None, common: CommonAttentionMetadata) -> RoutedStep:
    """The step, which notes what its first builder is handed.

    Raises RuntimeError for a step nobody has planned: its metadata would be that of stock vLLM.
    """
    if step is None:
        raise RuntimeError(
            "Attention metadata of a routed model was asked for without a plan of the step. The model "
            "runner in use is not known to vllm_reroute; serve without --reroute-schedule."
        )
    if step.common is None and step.plan is not None:
        step.common = common
    return step


def check_graph(step: RoutedStep, *, full_graph: bool) -> None:
    """Raises RuntimeError for a step a captured graph of the whole model would run without routing."""
    if full_graph and step.plan is not None and step.plan.boundary is not None:
        raise RuntimeError(
            "vLLM would run an image prefill as a decode step, in a captured CUDA graph, where nothing "
            "is routed. The scheduler in use is not that of vllm_reroute; serve without "
            "--reroute-schedule, or with --enforce-eager."
        )
