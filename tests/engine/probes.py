"""Functions that run inside the engine's process, see `host.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.engine.requests import Answer, Ask


def generate(llm: Any, asks: Sequence[Ask]) -> list[Answer]:
    """Answer all requests in one batch."""
    outputs = llm.generate(
        [ask.prompt() for ask in asks], [ask.sampling_params() for ask in asks], use_tqdm=False
    )
    return [_answer(llm, output) for output in outputs]


def generate_one_by_one(llm: Any, asks: Sequence[Ask]) -> list[Answer]:
    """Answer each request alone."""
    return [generate(llm, [ask])[0] for ask in asks]


def _answer(llm: Any, output: Any) -> Answer:
    completion = output.outputs[0]
    steps = completion.logprobs or []
    return Answer(
        prompt_token_ids=list(output.prompt_token_ids),
        token_ids=list(completion.token_ids),
        logprobs=[{token: entry.logprob for token, entry in step.items()} for step in steps],
        selected=_selected(llm, output),
        num_cached=output.num_cached_tokens or 0,
        num_created=output.num_cache_creation_tokens or 0,
    )


def _selected(llm: Any, output: Any) -> list[list[int]]:
    """What each decision kept, as the engine told the request."""
    from vllm_reroute.explain.trace import trace_of
    from vllm_reroute.schedule import RoutingSchedule

    told = output.outputs[0].routed_experts
    if told is None:
        return []
    schedule = RoutingSchedule.of(llm.llm_engine.vllm_config)
    trace = trace_of(told, schedule, len(output.prompt_token_ids))
    return [decision.kept.tolist() for decision in trace.decisions]


def stepwise(llm: Any, asks: Sequence[Ask], every: int) -> dict[str, Any]:
    """Add a request every few steps; return tokens, decisions and preemptions seen."""
    engine, pending, finished, steps = llm.llm_engine, list(enumerate(asks)), {}, 0
    preempted: set[str] = set()
    while pending or engine.has_unfinished_requests():
        if pending and steps % every == 0:
            index, ask = pending.pop(0)
            engine.add_request(
                str(index), llm._preprocess_cmpl([ask.prompt()])[0], ask.sampling_params()
            )
        for output in engine.step():
            if output.finished:
                finished[output.request_id.split("-")[0]] = output
        preempted |= {
            r.request_id for r in scheduler_of(llm).requests.values() if r.num_preemptions
        }
        steps += 1
    return {
        "tokens": [list(finished[str(i)].outputs[0].token_ids) for i in range(len(asks))],
        "cached": [finished[str(i)].num_cached_tokens for i in range(len(asks))],
        "prompts": [list(finished[str(i)].prompt_token_ids) for i in range(len(asks))],
        "decisions": [_selected(llm, finished[str(i)]) for i in range(len(asks))],
        "preempted": len(preempted),
        "free": free_blocks(llm),
    }


def kv_lens(llm: Any, asks: Sequence[Ask]) -> list[list[int]]:
    """K/V entries that every decoder layer attends to in a request's last step, request by request."""
    from vllm.forward_context import get_forward_context

    from vllm_reroute.routing.decoder import RoutedDecoder

    forward = RoutedDecoder.forward
    lens: list[int] = []

    def recording_forward(self: Any, *inputs: Any) -> Any:
        metadata = get_forward_context().attn_metadata
        attentions = [layer.self_attn.attn for run in self._runs for layer in run.layers]
        lens[:] = [int(metadata[a.place.owner].views.seq_lens[0]) for a in attentions]
        return forward(self, *inputs)

    RoutedDecoder.forward = recording_forward
    try:
        return [(generate(llm, [ask]), list(lens))[1] for ask in asks]
    finally:
        RoutedDecoder.forward = forward


def scheduler_of(llm: Any) -> Any:
    """The engine core's scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def free_blocks(llm: Any) -> int:
    return scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def turn_marker(llm: Any) -> tuple[int, ...]:
    """Token ids by which prompts ask the assistant to speak."""
    from vllm_reroute.schedule import RoutingSchedule

    return RoutingSchedule.of(llm.llm_engine.vllm_config).marker


def runner_name(llm: Any) -> str:
    """`V1` or `V2`."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    worker = executor.driver_worker.worker
    return "V2" if worker.use_v2_model_runner else "V1"


def fill_by_kernel(llm: Any) -> None:
    """From now on the tables of steps are filled as on GPUs; for V2, whose process interprets Triton."""
    from vllm_reroute.attention.step_kernel import KernelFill

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    tables = worker.model_runner.get_model().routed_decoder.tables
    tables.kernel = KernelFill(tables)
