"""KV cache bytes of one request, dense and routed."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_reroute.schedule.routing_schedule import RoutingSchedule

TYPICAL_TEXT_TOKENS = 104
"""Text tokens of a typical image request: a LLaVA-1.5 chat prompt, a question, a short answer."""


@dataclass(frozen=True, kw_only=True)
class RequestFootprint:
    """K/V a request with `num_visual` + `num_text` tokens holds.

    image_sizes: visual tokens of each image; where not given, all are of one.
    bytes_per_token: K and V of one token in one layer, on one tensor-parallel rank.
    block_size: tokens per block.
    """

    schedule: RoutingSchedule
    num_visual: int
    num_text: int
    bytes_per_token: int
    block_size: int
    image_sizes: tuple[int, ...] = ()

    @property
    def kept(self) -> list[int]:
        """Visual tokens that hold K/V in each stage."""
        return self.schedule.kept_per_stage(*(self.image_sizes or (self.num_visual,)))

    @property
    def routed_blocks(self) -> int:
        """Blocks of a routed engine; one holds `block_size` tokens of one layer."""
        return sum(
            stage.num_layers * self._blocks(self.num_text + k)
            for stage, k in zip(self.schedule.stages, self.kept, strict=True)
        )

    @property
    def routed_bytes(self) -> int:
        return self.routed_blocks * self.block_size * self.bytes_per_token

    @property
    def dense_bytes(self) -> int:
        """The same request in stock vLLM, with the same block size."""
        blocks = self._blocks(self.num_text + self.num_visual)
        return self.schedule.num_layers * blocks * self.block_size * self.bytes_per_token

    @property
    def ideal_bytes(self) -> int:
        """Sum over layers of text + kept tokens, without rounding to blocks."""
        return self.bytes_per_token * sum(
            stage.num_layers * (self.num_text + k)
            for stage, k in zip(self.schedule.stages, self.kept, strict=True)
        )

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
