"""What differs between a CPU and a GPU, and nothing else does."""

import os
import shutil
import subprocess

from benchmarks.quality.provenance import cpu

ON_GPU = shutil.which("nvidia-smi") is not None
# The smallest that each kind of backend takes, for stock and routed alike: vLLM's CPU default of 128
# would round both up.
BLOCK_SIZE = 16 if ON_GPU else 32
DTYPE = "bfloat16" if ON_GPU else "float32"
# Eager is what vLLM's CPU build is mostly run with here; a GPU without graphs measures Python.
EAGER = not ON_GPU
# Most that ever take turns in one wave, and what one of the wide model takes of main memory in fp32.
MOST_AT_ONCE, LEAST_AT_ONCE = 8, 3
ENGINE_GIB = 3.0
# Starting an engine is mostly imports: one core's work each.
STARTS_AT_ONCE = 1 if ON_GPU else 2


def engines_at_once() -> int:
    """Engines that may live side by side: each holds weights of its own."""
    if ON_GPU:
        return MOST_AT_ONCE
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(LEAST_AT_ONCE, min(MOST_AT_ONCE, int(memory / ENGINE_GIB)))


def threads() -> int:
    """Cores this program may use: `taskset` in front of the command pins everything it starts."""
    return len(os.sched_getaffinity(0))


def environment() -> dict[str, str]:
    """Of this process and all it starts: OpenMP reads its part when it is loaded. What is set stays."""
    wanted = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if not ON_GPU:
        wanted |= {
            # Engines that take turns may all use all cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads()),
            # Threads that wait must not disturb whoever's turn is next. GNU's runtime, which the CPU
            # build loads, stops spinning within a millisecond; Intel's would go on for 200.
            "KMP_BLOCKTIME": "5",
        }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def name() -> str:
    """The machine, as results name it."""
    if not ON_GPU:
        return cpu()
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return f"{'; '.join(listed.strip().splitlines())}; {cpu()}"
