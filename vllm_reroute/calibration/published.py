"""Published schedules at the budget of a calibrated one, for comparison."""

from __future__ import annotations

from vllm_reroute.calibration.choice import Wish
from vllm_reroute.schedule.budget import REFERENCE_VISUAL_TOKENS
from vllm_reroute.schedule.options import RerouteOptions
from vllm_reroute.schedule.published import ACTIONS, SCHEDULES, starts_in_encoder
from vllm_reroute.schedule.routing_schedule import RoutingSchedule


def published_schedules(
    wish: Wish, num_layers: int
) -> tuple[dict[str, RoutingSchedule], dict[str, str]]:
    """By name and action, solved for the wish's share; and why others cannot be compared."""
    found, left_out = {}, {}
    for name, actions in SCHEDULES.items():
        for action in ACTIONS:
            if action not in actions:
                continue
            title = f"{name} {action}"
            if starts_in_encoder(actions[action]):
                left_out[title] = "its first decision is the vision encoder's"
                continue
            options = RerouteOptions(
                schedule=name, action=action, budget=wish.share * REFERENCE_VISUAL_TOKENS
            )
            try:
                found[title] = options.resolve(num_layers, wish.first_layer)
            except ValueError:
                left_out[title] = "its dense layers alone exceed this budget"
    return found, left_out
