"""Kernels where routed pages are and stock's are not, and the kernel that fills the tables.

Attention: blocks whose elements are past 2^31 of one tensor, since all layers share one pool; tables
with the row stride of a stage's; padded requests. On GPUs only.

Tables: the kernel against the torch version, on random batches; how long filling them takes; and
whether anything of it waits for the device.
"""

import argparse
import time

import numpy as np
import torch

from benchmarks.gpu.record import Record, run_step
from benchmarks.gpu.timing import spread_ms
from vllm_reroute.attention.step_tables import RunnerLengths, StepTables
from vllm_reroute.plan.batch_routing import BatchRouting
from vllm_reroute.plan.planning import plan_step
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.step_plan import StepPlan
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.schedule import RerouteOptions

HEADS, DIM, BLOCK = 32, 128, 16
SEQ_LENS, QUERY_LENS = [37, 160, 1, 601], [37, 1, 1, 601]
PADDED = 2
MOST_ERROR = 1e-2
REQUESTS, VISUAL, PROMPT, MAX_LEN = 32, 576, 640, 4096


def main(args: argparse.Namespace, record: Record) -> None:
    right = []
    if not args.trial:
        for name in ("FLASH_ATTN", "TRITON_ATTN"):
            for layout in ("NHD", "HND"):
                found = attention(name, layout)
                right.append(found["relative_error"] < MOST_ERROR)
                record.put(**{f"{name} {layout}": found})
    device = torch.device("cpu" if args.trial else "cuda")
    same = tables_agree(device)
    record.put(tables_equal_to_torch=same, **filling(device, 20 if args.trial else 300))
    record.put(passed=all(right) and same and record.values["waits_for_device"] is None)


def attention(name: str, layout: str) -> dict:
    """One backend's write and read of K/V near the end of a pool of 60 % of the free memory."""
    dev = torch.device("cuda")
    token = HEADS * 2 * DIM * 2
    blocks = min(70_000, int(torch.cuda.mem_get_info()[0] * 0.6) // (BLOCK * token))
    shape = (blocks, BLOCK, HEADS) if layout == "NHD" else (blocks, HEADS, BLOCK)
    cache = torch.zeros(*shape, 2 * DIM, device=dev, dtype=torch.bfloat16)
    if layout == "NHD":
        cache = cache.transpose(1, 2)
    keys, values = cache.transpose(1, 2).split(DIM, dim=-1)
    table = torch.zeros(len(SEQ_LENS) + PADDED, 64, dtype=torch.int32, device=dev)
    last, slots = blocks - 1, []
    for row, length in zip(table, SEQ_LENS, strict=False):
        own = torch.arange(last, last - -(-length // BLOCK), -1, device=dev, dtype=torch.int32)
        row[: len(own)], last = own, last - len(own)
        places = torch.arange(length, device=dev)
        slots.append(own[places // BLOCK].long() * BLOCK + places % BLOCK)

    def values_of(lens: list[int]) -> list[torch.Tensor]:
        return [torch.randn(n, HEADS, DIM, device=dev, dtype=torch.bfloat16) for n in lens]

    k, v, q = values_of(SEQ_LENS), values_of(SEQ_LENS), values_of(QUERY_LENS)
    lens = torch.tensor([*SEQ_LENS, *[0] * PADDED], dtype=torch.int32, device=dev)
    ends = np.cumsum([0, *QUERY_LENS, *[0] * PADDED])
    starts = torch.tensor(ends, dtype=torch.int32, device=dev)
    out = torch.full_like(torch.cat(q), float("nan"))
    run = _flash if name == "FLASH_ATTN" else _triton
    run(
        torch.cat(q), torch.cat(k), torch.cat(v), out,
        keys, values, torch.cat(slots), table, lens, starts,
    )  # fmt: skip
    errors = [
        float((found.float() - want).norm() / want.norm())
        for found, want in zip(out.split(QUERY_LENS), map(_reference, q, k, v), strict=True)
    ]
    elements = cache.numel() / 2**31
    del cache, keys, values
    torch.cuda.empty_cache()
    return {"blocks": blocks, "elements_of_2^31": round(elements, 2), "relative_error": max(errors)}


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last len(q) of len(k) tokens, fp32."""
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * DIM**-0.5
    place = torch.arange(len(k), device=q.device)
    later = place[None] > place[len(k) - len(q) :, None]
    shares = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", shares, v.float())


def _flash(q, k, v, out, keys, values, slots, table, lens, starts) -> None:
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_varlen_func,
        get_flash_attn_version,
        get_scheduler_metadata,
        reshape_and_cache_flash,
    )

    version, one = get_flash_attn_version(), torch.ones((), device=q.device)
    assert version is not None, "asked for where there is one"
    reshape_and_cache_flash(k, v, keys, values, slots, "auto", one, one)
    planned = None
    if version == 3:
        planned = get_scheduler_metadata(
            batch_size=len(lens), max_seqlen_q=max(QUERY_LENS), max_seqlen_k=max(SEQ_LENS),
            num_heads_q=HEADS, num_heads_kv=HEADS, headdim=DIM, cache_seqlens=lens,
            qkv_dtype=q.dtype, cu_seqlens_q=starts, page_size=BLOCK, causal=True,
            window_size=(-1, -1), num_splits=0,
        )  # fmt: skip
    flash_attn_varlen_func(
        q=q, k=keys, v=values, out=out, cu_seqlens_q=starts, max_seqlen_q=max(QUERY_LENS),
        seqused_k=lens, max_seqlen_k=max(SEQ_LENS), softmax_scale=DIM**-0.5, causal=True,
        block_table=table, scheduler_metadata=planned, fa_version=version, num_splits=0,
    )  # fmt: skip


def _triton(q, k, v, out, keys, values, slots, table, lens, starts) -> None:
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
        triton_reshape_and_cache_flash,
    )
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    one = torch.ones((), device=q.device)
    scales = one.expand(len(lens), HEADS)
    triton_reshape_and_cache_flash(k, v, keys, values, slots, "auto", one, one)
    unified_attention(
        q=q, k=keys, v=values, out=out, cu_seqlens_q=starts, max_seqlen_q=max(QUERY_LENS),
        seqused_k=lens, max_seqlen_k=max(SEQ_LENS), softmax_scale=DIM**-0.5, causal=True,
        window_size=(-1, -1), block_table=table, softcap=0, q_descale=None,
        k_descale=scales, v_descale=scales,
    )  # fmt: skip


class Steps:
    """Steps of a batch of image requests of LLaVA-1.5's size, and the tables that hold them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.schedule = RerouteOptions(schedule="pdrop", tier=64).resolve(32)
        layers = [stage.num_layers for stage in self.schedule.stages]
        self.tables = StepTables(layers)
        self.tables.allocate(
            block_size=BLOCK, max_reqs=256, max_tokens=8192, max_blocks=MAX_LEN // BLOCK,
            device=device,
        )  # fmt: skip
        generator = np.random.default_rng(0)
        self.interleaved = [
            torch.from_numpy(
                generator.integers(1, 50_000, (REQUESTS, n * MAX_LEN // BLOCK), dtype=np.int32)
            ).to(device)
            for n in layers
        ]
        routing = RequestRouting.of(
            VisualSpans((5,), (5 + VISUAL,)), range(PROMPT), self.schedule, BLOCK
        )
        self.batch = BatchRouting.of([routing] * REQUESTS, len(layers))

    def plan(self, computed: np.ndarray, scheduled: np.ndarray) -> StepPlan:
        return plan_step(
            computed, scheduled, self.batch, dense_stages=1, block_size=BLOCK, offers_parked=True
        )

    def lengths(self, computed: np.ndarray, scheduled: np.ndarray) -> RunnerLengths:
        """What the runner would have on the device."""
        starts = np.concatenate(([0], np.cumsum(scheduled)))
        return RunnerLengths(
            torch.from_numpy((computed + scheduled).astype(np.int32)).to(self.device),
            torch.from_numpy(starts.astype(np.int32)).to(self.device),
        )

    def fill(self, plan: StepPlan, lengths: RunnerLengths) -> None:
        self.tables.fill(
            plan, self.interleaved, num_reqs=REQUESTS, num_tokens=plan.num_tokens, lengths=lengths
        )


def tables_agree(device: torch.device) -> bool:
    """Whether a kernel gives what layers read as the host does, in prefills, chunks and decodes."""
    found, expect = Steps(device), Steps(torch.device("cpu"))
    generator = np.random.default_rng(1)
    for scheduled in (200, 1, 440, 1, 1):
        counts = np.full(REQUESTS, scheduled, dtype=np.int64)
        computed = np.full(REQUESTS, 0 if scheduled == 200 else 200, dtype=np.int64)
        if scheduled == 1:
            computed = PROMPT + generator.integers(0, 300, REQUESTS)
        plan = found.plan(computed, counts)
        for steps in (found, expect):
            steps.fill(plan, steps.lengths(computed, counts))
        a, b = found.tables, expect.tables
        used = slice(0, plan.num_tokens)
        same = (
            torch.equal(a.seq_lens[:, :REQUESTS].cpu(), b.seq_lens[:, :REQUESTS])
            and torch.equal(a.query_start_loc.cpu(), b.query_start_loc)
            and torch.equal(a.slot_mappings[:, used].cpu(), b.slot_mappings[:, used])
        )
        first = 0
        for number, stage in enumerate(found.schedule.stages):
            for request, length in enumerate(plan.seq_lens[number].tolist()):
                own = slice(first, first + stage.num_layers), request, slice(0, -(-length // BLOCK))
                same &= torch.equal(a.block_tables[own].cpu(), b.block_tables[own])
            first += stage.num_layers
        if not same:
            return False
    return True


def filling(device: torch.device, times: int) -> dict:
    """Host time of one decode step's tables, time back to back, and what waited."""
    steps = Steps(device)
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    ones, computed = np.ones(REQUESTS, dtype=np.int64), np.full(REQUESTS, 700, dtype=np.int64)
    lengths = steps.lengths(computed, ones)

    def fill() -> None:
        steps.fill(steps.plan(computed, ones), lengths)

    for _ in range(10):
        fill()
    waited = None
    if on_gpu:
        torch.cuda.set_sync_debug_mode("error")
        try:
            fill()
        except RuntimeError as error:
            waited = str(error)[:300]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    host = []
    for _ in range(times):
        wait()
        begin = time.perf_counter()
        fill()
        host.append(time.perf_counter() - begin)
    wait()
    begin = time.perf_counter()
    for _ in range(times):
        fill()
    wait()
    back_to_back = (time.perf_counter() - begin) / times
    return {
        "waits_for_device": waited,
        "plan_and_fill_host_ms": spread_ms(host),
        "plan_and_fill_back_to_back_ms": round(1e3 * back_to_back, 4),
    }


if __name__ == "__main__":
    run_step(argparse.ArgumentParser(description=__doc__), main)
