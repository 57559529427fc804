"""What the machine has, and whether vLLM finds the plugin there."""

import argparse
import platform
import sys

from benchmarks.bench import device
from benchmarks.gpu.record import Record, run_step
from benchmarks.quality.provenance import installed, this_run

PACKAGES = ("triton", "flashinfer-python", "numpy")


def main(args: argparse.Namespace, record: Record) -> None:
    record.put(
        run=this_run(),
        python=sys.version.split()[0],
        system=platform.platform(),
        machine=device.name(),
        versions={name: installed(name) for name in PACKAGES},
    )
    import torch

    if not args.trial:
        record.put(
            card=torch.cuda.get_device_name(),
            compute_capability=list(torch.cuda.get_device_capability()),
            cuda=torch.version.cuda,
            bf16_tflops=matmul_tflops(),
        )
    from vllm import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    routed = [a for a in ModelRegistry.get_supported_archs() if a.startswith("Reroute")]
    record.put(platform=type(current_platform).__name__, routed=sorted(routed))
    right = current_platform.is_cpu() if args.trial else current_platform.is_cuda_alike()
    record.put(passed=bool(routed) and right)


def matmul_tflops(size: int = 4096, times: int = 20) -> float:
    """Of bf16 matrix products: whether the card runs as fast as it should."""
    import torch

    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        a @ a
    begin.record()
    for _ in range(times):
        a @ a
    end.record()
    torch.cuda.synchronize()
    return round(times * 2 * size**3 / begin.elapsed_time(end) / 1e9, 1)


if __name__ == "__main__":
    run_step(argparse.ArgumentParser(description=__doc__), main)
