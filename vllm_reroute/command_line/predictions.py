"""The cost model as `vllm-reroute plan` prints it."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_reroute.schedule.cost_model import RequestCost
from vllm_reroute.schedule.footprint import RequestFootprint

BATCHES = (1, 16, 64)
BYTES_PER_VALUE = 2
"""16-bit weights and K/V."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What the user says of the machine. None: not said, and nothing is derived from it.

    peak_tflops, bandwidth_gbs, pool_gib: of ONE device. tensor_parallel: devices that share the work.
    """

    peak_tflops: float | None = None
    bandwidth_gbs: float | None = None
    pool_gib: float | None = None
    tensor_parallel: int = 1


def prediction_lines(
    cost: RequestCost, footprint: RequestFootprint, hardware: Hardware
) -> list[str]:
    """Prefill, decode and capacity, relative to dense; absolute times only from given hardware."""
    return [
        "PREDICTION by arithmetic, not a measurement:",
        *_prefill(cost),
        "",
        *_decode(cost, hardware.tensor_parallel),
        "",
        *_capacity(footprint, hardware),
        *_times(cost, hardware),
        "",
        *_assumptions(cost, hardware.tensor_parallel),
    ]


def _prefill(cost: RequestCost) -> list[str]:
    lines = ["  prefill         tokens      GFLOP   of dense   decision before it, GFLOP"]
    for each in cost.stages:
        layers = f"{each.stage.first_layer}-{each.stage.end_layer - 1}"
        lines.append(
            f"  layers {layers:<7} {each.num_tokens:>6}   {each.flops / 1e9:>8.1f}   "
            f"{each.flops / each.dense_flops:>8.1%}   {each.decision_flops / 1e9:>8.2f}"
        )
    tower = "tower and head" if cost.vision else "head only: this family's tower is not counted"
    lines += [
        f"  unchanged by routing {cost.fixed_flops / 1e9:,.1f} GFLOP ({tower})",
        f"  prefill, dense {cost.dense_flops / 1e9:,.1f} GFLOP, routed {cost.routed_flops / 1e9:,.1f} GFLOP: "
        f"{cost.dense_flops / cost.routed_flops:.2f} times less",
        f"  layer·token products alone: {1 / cost.token_ratio:.2f} times fewer",
    ]
    return lines


def _decode(cost: RequestCost, ranks: int) -> list[str]:
    dense, routed = (
        BYTES_PER_VALUE * cost.kv_values(routed=r) * _kv_share(cost, ranks) for r in (False, True)
    )
    lines = [
        f"  K/V read per decode step and request, per device: dense {dense / 1e6:,.1f} MB, "
        f"routed {routed / 1e6:,.1f} MB ({routed / dense:.1%})"
    ]
    shares = []
    for batch in BATCHES:
        dense_step, routed_step = (_step_bytes(cost, batch, ranks, routed=r) for r in (False, True))
        shares.append(f"{routed_step / dense_step:.1%} at batch {batch}")
    return [*lines, f"  weights and K/V together, routed of dense: {', '.join(shares)}"]


def _capacity(footprint: RequestFootprint, hardware: Hardware) -> list[str]:
    ratio = footprint.dense_bytes / footprint.routed_bytes
    lines = [
        f"  requests in one KV pool, blocks of {footprint.block_size}: {ratio:.2f} times as many"
    ]
    if hardware.pool_gib is not None:
        pool = int(hardware.pool_gib * 2**30)
        lines.append(
            f"  in {hardware.pool_gib:g} GiB per device: {pool // footprint.dense_bytes} dense, "
            f"{pool // footprint.routed_bytes} routed"
        )
    return lines


def _times(cost: RequestCost, hardware: Hardware) -> list[str]:
    lines = []
    if hardware.peak_tflops is not None:
        rate = hardware.tensor_parallel * hardware.peak_tflops * 1e9
        lines.append(
            f"  prefill at {hardware.peak_tflops:g} TFLOP/s per device, no less than: dense "
            f"{cost.dense_flops / rate:.2f} ms, routed {cost.routed_flops / rate:.2f} ms"
        )
    if hardware.bandwidth_gbs is not None:
        of_batches = []
        for batch in BATCHES:
            dense, routed = (
                _step_bytes(cost, batch, hardware.tensor_parallel, routed=r)
                / (hardware.bandwidth_gbs * 1e6)
                for r in (False, True)
            )
            of_batches.append(f"{dense:.2f} / {routed:.2f} ms at batch {batch}")
        lines.append(
            f"  decode step at {hardware.bandwidth_gbs:g} GB/s per device, no less than (dense / routed): "
            + ", ".join(of_batches)
        )
    return lines


def _assumptions(cost: RequestCost, ranks: int) -> list[str]:
    images = len(cost.image_sizes)
    return [
        f"  Assumed: {images} image{'s' * (images > 1)}, 16-bit weights and K/V, {ranks} "
        f"device{'s' * (ranks > 1)}, all text tokens (prompt and answer) in the prefill and in every",
        "  decode step; a multiply-add is two FLOPs; norms, sampling, the host, communication between",
        "  devices, kernels' efficiency and rounding to blocks (but in the pool) are left out.",
    ]


def _kv_share(cost: RequestCost, ranks: int) -> float:
    """Share of K/V one rank holds: heads are dealt out, and repeated where there are too few."""
    heads = cost.decoder.num_kv_heads
    return max(1, heads // ranks) / heads


def _step_bytes(cost: RequestCost, batch: int, ranks: int, *, routed: bool) -> float:
    kv = batch * cost.kv_values(routed=routed) * _kv_share(cost, ranks)
    return BYTES_PER_VALUE * (cost.decoder.step_parameters / ranks + kv)
