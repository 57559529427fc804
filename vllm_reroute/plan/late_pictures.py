"""Pictures that a worker needs although it was not sent them, on their way from the scheduler.

vLLM leaves the data of a picture out where a request finds all of it in the prefix cache. If that request
is preempted, and by the time it comes back neither the cache nor the vision encoder's output is there
any more, the picture runs once more. They travel in an attribute of their own of vLLM's `SchedulerOutput`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.core.sched.output import SchedulerOutput

_ATTRIBUTE = "reroute_late_pictures"

Pictures = Mapping[str, Sequence["MultiModalFeatureSpec"]]
"""By request id: all of the request's, with their data."""


def send(output: SchedulerOutput, pictures: Pictures) -> None:
    """Let pictures travel with a step that encodes them."""
    setattr(output, _ATTRIBUTE, dict(pictures))


def take(output: SchedulerOutput) -> Pictures:
    """None in most steps."""
    late: Any = getattr(output, _ATTRIBUTE, {})
    return late
