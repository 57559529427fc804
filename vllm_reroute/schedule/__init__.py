"""Options, published schedules, and the schedule resolved for one model."""

from vllm_reroute.schedule.options import RerouteOptions
from vllm_reroute.schedule.published import PublishedSchedule, Schedule
from vllm_reroute.schedule.routing_schedule import (
    CONFIG_KEY,
    SCHEDULE_KEY,
    RoutingSchedule,
    Stage,
    is_routed,
)

__all__ = [
    "CONFIG_KEY",
    "SCHEDULE_KEY",
    "PublishedSchedule",
    "RerouteOptions",
    "RoutingSchedule",
    "Schedule",
    "Stage",
    "is_routed",
]
