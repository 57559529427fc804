"""The speed-up no implementation of a schedule can beat on this machine.

A stock engine's time to first token is taken as T(depth) = fixed + depth * per_layer: image processing,
vision tower, embedding, output head, sampling and the engine's own step do not depend on the depth. Two
stock engines of the same widths and different depths, measured in the same round, give both numbers.
Routing can only save layer·token products, so at best it takes

    fixed + (dense - fixed) * ratio

where ratio is the products routed over dense, text tokens included. Decisions are not granted any time,
and attention is taken to shrink as the products do, although it shrinks faster (it is a few percent of
the work at these lengths): the limit is a little low there.
"""

from dataclasses import dataclass

from vllm_reroute.schedule import RoutingSchedule


@dataclass(frozen=True, kw_only=True)
class StockParts:
    """Times of two stock engines in one round, seconds to the first token."""

    dense_s: float
    depth: int
    shallow_s: float
    shallow_depth: int

    @property
    def per_layer_s(self) -> float:
        return (self.dense_s - self.shallow_s) / (self.depth - self.shallow_depth)

    @property
    def fixed_s(self) -> float:
        """What is left of the dense time without any layer; never below 0, which only noise gives."""
        return max(0.0, self.shallow_s - self.shallow_depth * self.per_layer_s)

    def speed_up_limit(self, ratio: float) -> float:
        """Dense over the best routed time. ratio: layer·token products, routed over dense."""
        return self.dense_s / (self.fixed_s + (self.dense_s - self.fixed_s) * ratio)


def product_ratio(schedule: RoutingSchedule, num_visual: int, num_text: int) -> float:
    """Layer·token products of a request with one image, routed over dense."""
    return (num_text + schedule.average(num_visual)) / (num_text + num_visual)
