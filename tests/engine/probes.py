"""Functions that run inside the engine's process, see `host.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.engine.requests import Answer, Ask


def generate(llm: Any, asks: Sequence[Ask]) -> list[Answer]:
    """Answer all requests in one batch, recording what each decision kept."""
    with recorded_decisions() as decisions:
        outputs = llm.generate(
            [ask.prompt() for ask in asks], [ask.sampling_params() for ask in asks], use_tqdm=False
        )
    return [_answer(output, decisions) for output in outputs]


def generate_one_by_one(llm: Any, asks: Sequence[Ask]) -> list[Answer]:
    """Answer each request alone."""
    return [generate(llm, [ask])[0] for ask in asks]


def _answer(output: Any, decisions: dict[int, list[list[int]]]) -> Answer:
    completion = output.outputs[0]
    steps = completion.logprobs or []
    return Answer(
        prompt_token_ids=list(output.prompt_token_ids),
        token_ids=list(completion.token_ids),
        logprobs=[{token: entry.logprob for token, entry in step.items()} for step in steps],
        selected=decisions.get(len(output.prompt_token_ids), []),
    )


@contextmanager
def recorded_decisions() -> Iterator[dict[int, list[list[int]]]]:
    """Prompt length -> kept visual tokens per decision, of the last prefill of that length."""
    from vllm_reroute.routing.decoder import RoutedDecoder

    decisions: dict[int, list[list[int]]] = {}
    run_routed, choose = RoutedDecoder._run_routed, RoutedDecoder._choose

    def recording_run(self: Any, *inputs: Any) -> Any:
        for prefill in inputs[-1].prefills:
            decisions[prefill.routing.num_prompt] = []
        return run_routed(self, *inputs)

    def recording_choose(self: Any, *inputs: Any) -> Any:
        running, chosen = choose(self, *inputs)
        visual_rows = running.rows[running.visual].tolist()
        for prefill in inputs[-1].prefills:
            mask = prefill.routing.spans.mask(prefill.num_tokens)
            places = {prefill.start + p: n for n, p in enumerate(mask.nonzero()[0].tolist())}
            kept = [places[row] for row in visual_rows if row in places]
            decisions[prefill.routing.num_prompt].append(kept)
        return running, chosen

    RoutedDecoder._run_routed, RoutedDecoder._choose = recording_run, recording_choose
    try:
        yield decisions
    finally:
        RoutedDecoder._run_routed, RoutedDecoder._choose = run_routed, choose


def stepwise(llm: Any, asks: Sequence[Ask], every: int) -> dict[str, Any]:
    """Add a request every few steps; return tokens, decisions and preemptions seen."""
    engine, pending, finished, steps = llm.llm_engine, list(enumerate(asks)), {}, 0
    preempted: set[str] = set()
    with recorded_decisions() as decisions:
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
        "prompts": [list(finished[str(i)].prompt_token_ids) for i in range(len(asks))],
        "decisions": decisions,
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
        attentions = [layer.self_attn.attn for piece in self._pieces for layer in piece.layers]
        lens[:] = [
            int(
                metadata[attention.kv_sharing_target_layer_name or attention.layer_name]
                .layers[attention.layer_in_group]
                .seq_lens[0]
            )
            for attention in attentions
        ]
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


def runner_name(llm: Any) -> str:
    """`V1` or `V2`."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    worker = executor.driver_worker.worker
    return "V2" if worker.use_v2_model_runner else "V1"
