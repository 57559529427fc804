"""Seeded requests whose prompts run in chunks, on CPU.

vLLM 0.32's V1 runner samples in every step of a chunked prompt, drops the token and turns the
request's random generator back. CPU generators cannot be turned back: the step raises and the engine
ends, with stock vLLM too. Here such a request draws without its generator until its token counts, so
that it is as if it had not drawn. To be deleted when `GPUModelRunner` no longer calls `set_offset`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def withhold_generators(runner: GPUModelRunner, num_scheduled_tokens: dict[str, int]) -> None:
    """Let only those seeded requests draw from their generators whose tokens count in this step."""
    batch = runner.input_batch
    if runner.device.type != "cpu":
        return
    for index, req_id in enumerate(batch.req_ids[: batch.num_reqs]):
        state = runner.requests[req_id]
        if state.generator is None:
            continue
        done = state.num_computed_tokens + num_scheduled_tokens[req_id]
        if done < state.num_tokens:
            batch.generators.pop(index, None)
        else:
            batch.generators[index] = state.generator
