"""Functions that run inside an engine's process, see `worker.py`; vLLM is imported there only."""

import itertools
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.photos import PHOTOS

QUESTION = "First count what lies above, below and inside. "
# With the local tokenizer, a prompt of 104 text tokens.
REPEATS = 8

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that are sent at once. images: of each request. text: times the question is put."""

    images: int = 1
    requests: int = 1
    answer_tokens: int = 1
    text: int = REPEATS

    def prompt(self) -> str:
        return "USER: " + "<image>\n" * self.images + QUESTION * self.text + "ASSISTANT:"

    def pictures(self) -> list[Any]:
        return [photo.image for photo, _ in zip(itertools.cycle(PHOTOS), range(self.images))]


def build_engine(state: dict, arguments: dict) -> None:
    # In this process: a step is a function call then, and the scheduler can be looked at.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    state["llm"] = LLM(**arguments)


def drive(state: dict, work: Workload) -> dict:
    """Answers the workload step by step.

    first_token_s: from before the images are processed until every request has its first token.
    decode_s: median of the steps after that. visual, prompt_tokens: of one request.
    """
    llm = state["llm"]
    engine = llm.llm_engine
    pictures = work.pictures()
    started = time.perf_counter()
    for _ in range(work.requests):
        add_request(llm, work, pictures)
    seen: dict[str, Any] = {}
    stamps: list[float] = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        seen.update((output.request_id, output) for output in outputs)
        if outputs and len(seen) == work.requests:
            stamps.append(time.perf_counter())
    steps = [after - before for before, after in itertools.pairwise(stamps)]
    request = next(iter(seen.values()))
    prompt = list(request.prompt_token_ids)
    return {
        "first_token_s": stamps[0] - started,
        "decode_s": statistics.median(steps) if steps else None,
        "total_s": stamps[-1] - started,
        "prompt_tokens": len(prompt),
        "visual": _visual(llm, prompt),
        "answer": list(request.outputs[0].token_ids),
    }


def fill_pool(
    state: dict, work: Workload, kept: Sequence[tuple[int, int]], kv_bytes: int, pool_bytes: int
) -> dict:
    """Sends more requests than the pool can hold and watches the scheduler.

    kept: (layers, visual tokens that hold K/V there) per stage. kv_bytes: of one token in one layer.
    in_flight: most requests that held their whole prompt at once; ideal: how many of the lengths they
    had then would fit without any rounding or waste.
    """
    llm = state["llm"]
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pictures = work.pictures()
    started = time.perf_counter()
    for _ in range(work.requests):
        add_request(llm, work, pictures)
    best, ideal = 0, 0
    preempted: dict[str, int] = {}
    while engine.has_unfinished_requests():
        engine.step()
        held = [r for r in scheduler.running if r.num_computed_tokens >= r.num_prompt_tokens]
        preempted |= {
            request.request_id: request.num_preemptions for request in scheduler.requests.values()
        }
        # Only while others wait does their number say how much the pool holds.
        if len(held) > best and scheduler.waiting:
            visual = _visual(llm, held[0].prompt_token_ids)
            texts = [request.num_computed_tokens - visual for request in held]
            own = sum(n * (text + k) for n, k in kept for text in texts) * kv_bytes / len(held)
            best, ideal = len(held), int(pool_bytes / own)
    return {
        "in_flight": best,
        "ideal": ideal,
        "preemptions": sum(preempted.values()),
        "total_s": time.perf_counter() - started,
    }


def add_request(llm: Any, work: Workload, pictures: list[Any]) -> None:
    """One of the workload's requests; it runs with the engine's next steps."""
    from vllm import SamplingParams

    prompt: dict[str, Any] = {"prompt": work.prompt()}
    if pictures:
        prompt["multi_modal_data"] = {"image": pictures}
    params = SamplingParams(temperature=0, max_tokens=work.answer_tokens, ignore_eos=True)
    llm.llm_engine.add_request(str(next(_numbers)), llm._preprocess_cmpl([prompt])[0], params)


def _visual(llm: Any, prompt: Sequence[int]) -> int:
    return list(prompt).count(llm.llm_engine.model_config.hf_config.image_token_id)
