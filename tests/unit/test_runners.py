"""How a step's plan reaches the metadata builders, by each of vLLM's two model runners."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.sampling_params import SamplingParams
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

from vllm_reroute.attention import key_pages
from vllm_reroute.attention.step import DUMMY_STEP, RoutedStep
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.step_plan import Places
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.runners.v1 import planned_step
from vllm_reroute.runners.v1_hook import MODEL_RUNNER_V1
from vllm_reroute.runners.v2 import RoutedAttnMetadata, RoutedModelState
from vllm_reroute.runners.worker import routed_worker

from .parts import feature
from .routed_model import CPU, Conversation, Conversations, plan_in, runner_of

SPANS, NUM_PROMPT = VisualSpans((40,), (60,)), 80


@pytest.fixture(scope="module")
def model(routed_model):
    return routed_model({"layers": [2, 5], "keep": [0.5, 0.25]})


@pytest.fixture
def run(model):
    routing = RequestRouting.of(SPANS, range(NUM_PROMPT), model.schedule, model.block_size)
    states = torch.zeros(NUM_PROMPT + 1, model.hidden_size)
    return Conversations(model, [Conversation(routing, states), Conversation(None, states)])


def test_no_plan_no_metadata(model, run):
    for builder, common in zip(model.builders, run.common([0, 1], [30, 5]), strict=True):
        with pytest.raises(RuntimeError, match=r"without a plan of the step.*without --reroute"):
            builder.build(0, common)


def test_the_builders_own_step_serves_where_none_is_handed_over(model, run):
    """V1 sets it, V2 hands one over, which goes first."""
    step, other = run.plan([0, 1], [30, 5]), DUMMY_STEP
    for builder, common in zip(model.builders[:-1], run.common([0, 1], [30, 5]), strict=False):
        builder.step = step
        try:
            assert builder.build(0, common).plan is step.plan
            assert builder.build(0, common, step=other).plan is None
        finally:
            builder.step = None


@pytest.mark.parametrize("scheduled", [NUM_PROMPT, 30], ids=["finishing", "text before the image"])
def test_layers_of_a_stage_share_all_but_their_blocks_and_slots(model, run, scheduled):
    tables, before = model.decoder.tables, 0
    step, common = run.plan([0, 1], [scheduled, 5]), run.common([0, 1], [scheduled, 5])
    for stage, builder in enumerate(model.builders[:-1]):
        lengths = step.plan.stages[stage]
        metadata = builder.build(0, common[stage], step=step)
        for index in range(model.schedule.stages[stage].num_layers):
            shared = metadata.of_layer(index)
            assert shared is metadata.shared
            assert shared.seq_lens.tolist() == lengths.seq_lens.tolist()
            assert shared.query_start_loc.tolist() == lengths.query_start_loc.tolist()
            assert shared.num_actual_tokens == lengths.num_tokens
            assert shared.max_query_len == lengths.query_lens.max()
            assert shared.max_seq_len == lengths.seq_lens.max()
            blocks = tables.block_tables[before + index, :2]
            slots = tables.slot_mappings[before + index, : lengths.num_tokens]
            assert torch.equal(shared.block_table, blocks)
            assert torch.equal(shared.slot_mapping, slots) and slots.ge(0).all()
        before += model.schedule.stages[stage].num_layers
    assert before == model.schedule.num_layers


@pytest.mark.parametrize(
    "graphs,of_text,of_image",
    [(CUDAGraphMode.NONE, 1, 3), (CUDAGraphMode.FULL, 3, 3)],
    ids=["eager", "full graphs"],
)
def test_stages_of_the_same_lengths_share_what_a_backend_makes_of_them(
    model, run, monkeypatch, graphs, of_text, of_image
):
    """But where graphs replay with each builder's own tensors."""
    monkeypatch.setattr(model.config.compilation_config, "cudagraph_mode", graphs)
    for (group,) in model.attn_groups:
        monkeypatch.setattr(group, "metadata_builders", [])  # those of other tests come back
        group.create_metadata_builders(model.config, CPU)
    builders = [group.get_metadata_builder() for (group,) in model.attn_groups[:-1]]
    run.requests[0].computed, run.requests[1].computed = NUM_PROMPT, 7
    for request, expect in ((1, of_text), (0, of_image)):
        step, common = run.plan([request], [1]), run.common([request], [1])
        built = [b.build(0, c, step=step) for b, c in zip(builders, common, strict=False)]
        assert len({id(metadata.shared) for metadata in built}) == expect
        assert len({id(metadata.views) for metadata in built}) == 3


def test_a_stage_that_nobody_runs_has_no_kernel_metadata(model, run):
    """A chunk that ends inside the image: kernels are never launched over no rows."""
    run.requests[0].computed = 32
    step, common = run.plan([0], [20]), run.common([0], [20])
    dense, *later = (
        b.build(0, c, step=step) for b, c in zip(model.builders[:-1], common, strict=False)
    )
    assert dense.shared.num_actual_tokens == 20
    assert [(m.plan, m.shared, m.views) for m in later] == [(step.plan, None, None)] * 2


def runner_table(blocks, block_size):
    """The V1 runner's table that holds these blocks [requests, entries]."""
    table = BlockTable(block_size, *blocks.shape, 512, False, CPU, 1)
    for row, own in enumerate(blocks):
        table.add_row(own[own > 0].tolist(), row)
    table.commit_block_table(len(blocks))
    return table


class Batch:
    """The V1 runner's batch of an image request and a text request."""

    def __init__(self, model, run, computed):
        self.states = {
            "image": SimpleNamespace(
                mm_features=[feature(40, 20)],
                prompt_token_ids=list(range(NUM_PROMPT)),
                mrope_positions=torch.arange(3 * NUM_PROMPT).view(3, NUM_PROMPT),
                sampling_params=None,
                generator=None,
            ),
            "text": SimpleNamespace(mm_features=[], prompt_token_ids=[1, 2, 3], generator=None),
        }
        tables = [runner_table(table, model.block_size) for table in run.tables]
        self.runner = runner_of(
            model,
            requests=self.states,
            input_batch=SimpleNamespace(
                req_ids=["image", "text", "left over"],
                num_reqs=2,
                num_computed_tokens_cpu=np.array([*computed, 999]),
                block_table=SimpleNamespace(block_tables=tables),
            ),
        )

    def planned(self, scheduled, **changes):
        sizes = {"num_tokens": sum(scheduled.values()), "num_reqs": 2, "dummy": False, **changes}
        return planned_step(self.runner, num_scheduled_tokens=scheduled, **sizes)


def test_v1_tells_the_first_group_s_builder_of_the_step_and_takes_it_back(model, run):
    batch = Batch(model, run, [0, 3])
    with batch.planned({"text": 1, "image": NUM_PROMPT}):
        (step, *others) = [builder.step for builder in model.builders]
        assert others == [None] * 3, "vLLM does not ask them"
        assert (
            batch.runner.kv_cache_config.kv_cache_groups
            == model.kv_cache_config.kv_cache_groups[:1]
        )
        assert step.plan.stages[0].query_lens.tolist() == [NUM_PROMPT, 1]
        assert step.plan.stages[1].seq_lens.tolist() == [NUM_PROMPT - 10, 4]
        assert model.decoder.tables.seq_lens[2, :2].tolist() == [NUM_PROMPT - 15, 4]
    assert [builder.step for builder in model.builders] == [None] * 4
    assert batch.runner.kv_cache_config is model.kv_cache_config
    with pytest.raises(KeyError, match="lost"), batch.planned({"text": 1, "image": 5}):
        raise KeyError("lost")
    assert [builder.step for builder in model.builders] == [None] * 4
    assert batch.runner.kv_cache_config is model.kv_cache_config


@pytest.mark.parametrize(
    "computed,scheduled",
    [([0, 3], [NUM_PROMPT, 1]), ([50, 3], [10, 1]), ([50, 3], [30, 1]), ([NUM_PROMPT, 3], [1, 1])],
    ids=["at once", "waits", "last chunk", "decode"],
)
def test_what_vllm_does_not_build_is_what_each_builder_makes_of_its_group(
    model, run, computed, scheduled
):
    """By the first group's metadata alone, with each group's own table where one is read."""
    batch = Batch(model, run, computed)
    for request, ran in zip(run.requests, computed, strict=True):
        request.computed = ran
    common = run.common([0, 1], scheduled)
    step = run.plan([0, 1], scheduled)
    expect = model.metadata(common, step)
    with batch.planned(dict(zip(("image", "text"), scheduled, strict=True))) as complete:
        first = model.builders[0].build(0, common[0])
        metadata = dict.fromkeys(model.layers_of[0], first)
        complete(metadata)
    assert set(metadata) == set(expect)
    for name, own in expect.items():
        found = metadata[name]
        if name == model.parked.layer_name:
            assert described(found) == described(own)
        else:
            assert found.plan is first.plan and found.views is own.views
            assert (found.shared is None) == (own.shared is None)
            if own.shared is not None:
                assert described(vars(found.shared)) == described(vars(own.shared))


def described(value):
    """Nested tensors as lists, so that they can be compared."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {
            name: described(part) for name, part in value.items() if name != "scheduler_metadata"
        }
    return described(vars(value)) if hasattr(value, "__dict__") else value


def test_v1_dummy_runs_have_a_step_of_their_own(model, run):
    """And vLLM goes through all groups: it may be capturing."""
    runner = Batch(model, run, [0, 0]).runner
    metadata = {}
    with planned_step(
        runner, num_tokens=8, num_reqs=2, num_scheduled_tokens=None, dummy=True
    ) as complete:
        assert all(builder.step is DUMMY_STEP for builder in model.builders)
        assert runner.kv_cache_config is model.kv_cache_config
        complete(metadata)
    assert not metadata


def test_v1_a_step_is_never_taken_for_a_dummy_run(model, run):
    batch, wrong = Batch(model, run, [0, 0]), "in a way vllm_reroute does not know"
    with pytest.raises(RuntimeError, match=f"{wrong}: a step, num_scheduled_tokens missing"):
        MODEL_RUNNER_V1.wrapper(
            lambda *_, **__: None, batch.runner, num_tokens=2, num_reqs=2, logits_indices=0
        )
    with pytest.raises(RuntimeError, match=wrong), batch.planned({"text": 3}, capturing=True):
        pass
    with pytest.raises(RuntimeError, match=wrong), batch.planned({"text": 3}, dummy=True):
        pass
    scheduled = {"text": 3, "image": NUM_PROMPT}
    with (
        pytest.raises(RuntimeError, match="decode step"),
        batch.planned(scheduled, full_graph=True),
    ):
        pass


def test_v1_leaves_other_models_alone(model, run):
    batch = Batch(model, run, [0, 0])
    batch.runner.get_model = lambda: SimpleNamespace()
    with batch.planned({"text": 1, "image": 5}):
        assert [builder.step for builder in model.builders] == [None] * 4


def test_v1_keeps_a_request_s_facts_with_the_request(model, run):
    batch = Batch(model, run, [0, 0])
    with batch.planned({"text": 3, "image": NUM_PROMPT}):
        (prefill,) = model.builders[0].step.plan.prefills
    routing = batch.states["image"].reroute_routing
    assert prefill.routing is routing and routing.spans == SPANS
    assert routing.num_prompt == NUM_PROMPT and routing.text_prefix == 32
    batch.runner.input_batch.req_ids = ["text", "image"]
    batch.runner.input_batch.num_computed_tokens_cpu[:2] = [3, NUM_PROMPT - 1]
    with batch.planned({"text": 1, "image": 1}):
        (prefill,) = model.builders[0].step.plan.prefills
        assert (prefill.index, prefill.first, prefill.num_tokens) == (1, 32, NUM_PROMPT - 32)
    assert prefill.routing is routing


@pytest.mark.parametrize("uses_mrope", [False, True])
def test_v1_positions_of_fetched_tokens(model, run, uses_mrope):
    batch = Batch(model, run, [50, 0])
    batch.runner.uses_mrope = uses_mrope
    with batch.planned({"text": 3, "image": 30}):
        step = model.builders[0].step
    places = range(32, 50)
    assert step.plan.boundary.fetched.position.tolist() == list(places)
    expect = batch.states["image"].mrope_positions[:, 32:50] if uses_mrope else torch.arange(32, 50)
    assert torch.equal(step.fetched_positions, expect)
    with Batch(model, run, [0, 0]).planned({"text": 3, "image": 30}):
        assert model.builders[0].step.fetched_positions is None


def test_v1_padding(model, run):
    with Batch(model, run, [NUM_PROMPT, 3]).planned({"text": 1, "image": 1}, num_tokens=4):
        tables = model.decoder.tables
        assert tables.slot_mappings[:, :2].ge(0).all()
        assert tables.slot_mappings[:, 2:4].eq(-1).all()


def test_v1_s_hook_speaks_of_the_step_with_padding(model, run, monkeypatch):
    batch = Batch(model, run, [NUM_PROMPT, 3])
    seen = []
    common = run.common([0, 1], [1, 1])[0]

    def original(runner, *args, **kwargs):
        seen.append(model.builders[0].step)
        built = model.builders[0].build(0, common)
        return dict.fromkeys(model.layers_of[0], built), "for drafts"

    model.decoder.tables.slot_mappings[:, :8] = 5
    built = MODEL_RUNNER_V1.wrapper(
        original,
        batch.runner,
        num_tokens=2,
        num_reqs=2,
        max_query_len=1,
        num_tokens_padded=6,
        num_scheduled_tokens={"text": 1, "image": 1},
        logits_indices=torch.arange(2),
    )
    metadata, for_drafts = built
    assert for_drafts == "for drafts" and isinstance(seen[0], RoutedStep)
    assert set(metadata) == {name for of in model.layers_of for name in of}
    assert plan_in(metadata) is seen[0].plan
    assert model.decoder.tables.slot_mappings[0, 2:8].tolist() == [-1] * 4 + [5, 5]


@pytest.fixture
def state(model):
    with set_current_vllm_config(model.config):
        state = RoutedModelState(model.config, model.model, None, CPU)
    state.initialize_kv_cache(model.kv_cache_config, None)
    state._is_warm = True
    return state


def new_request(name, images=(), num_prompt=NUM_PROMPT, generated=0):
    return NewRequestData(
        req_id=name,
        prompt_token_ids=list(range(num_prompt)),
        mm_features=list(images),
        sampling_params=None,
        pooling_params=None,
        block_ids=(),
        num_computed_tokens=0,
        lora_request=None,
        prefill_token_ids=list(range(num_prompt + generated)),
    )


def v2_batch(names, computed, scheduled):
    """An `InputBatch` as the V2 runner makes it; without names, one of its dummy runs."""
    batch = InputBatch.make_dummy(len(scheduled), sum(scheduled), InputBuffers(16, 512, CPU))
    starts = np.array([0, *np.cumsum(scheduled)], dtype=np.int32)
    ends = torch.tensor([c + s for c, s in zip(computed, scheduled, strict=True)])
    batch.req_ids = names or batch.req_ids
    batch.num_scheduled_tokens = np.array(scheduled, dtype=np.int32)
    batch.num_computed_tokens_np = np.array(computed, dtype=np.int32)
    batch.query_start_loc_np, batch.query_start_loc = starts, torch.from_numpy(starts)
    batch.seq_lens = ends.to(torch.int32)
    batch.seq_lens_cpu_upper_bound = ends.to(torch.int32)
    return batch


def prepare(model, run, state, batch, **changes):
    tables = tuple(table[: batch.num_reqs] for table in run.tables)
    slots = torch.full((len(tables), batch.num_tokens), -1)
    mode = changes.pop("mode", CUDAGraphMode.NONE)
    return state.prepare_attn(
        batch, mode, tables, slots, model.attn_groups, model.kv_cache_config, **changes
    )


def test_v2_hands_the_step_to_build(model, run, state):
    step = run.plan([0, 1], [30, 5])
    handed = RoutedAttnMetadata(step).get_extra_attn_kwargs(model.builders[0], 2)
    assert handed == {"step": step}
    state.add_request(0, new_request("image", [feature(40, 20)], generated=2))
    state.add_request(1, new_request("text"))
    metadata = prepare(model, run, state, v2_batch(["image", "text"], [0, 3], [NUM_PROMPT, 1]))
    plan = plan_in(metadata)
    (prefill,) = plan.prefills
    assert prefill.routing.num_prompt == NUM_PROMPT, "generated tokens are no prompt"
    assert plan.stages[2].seq_lens.tolist() == [NUM_PROMPT - 15, 4]
    assert set(metadata) == {name for of in model.layers_of for name in of}
    assert metadata[model.parked.layer_name].rows is not None
    assert [builder.step for builder in model.builders] == [None] * 4, "nothing is left behind"


@pytest.fixture(params=[{}, {"history": "keep", "marker": (4, 5, 4)}], ids=str)
def cold(request, model, monkeypatch):
    """Nothing has run; counts how often each stage does. Nothing may be left of it."""
    before = model.pool.clone()
    key_pages._FOUND.clear()
    # With it a step writes parked states, too.
    monkeypatch.setattr(model.config.cache_config, "enable_prefix_caching", True)
    monkeypatch.setattr(model.decoder, "schedule", replace(model.schedule, **request.param))
    run_stage, ran = model.decoder._runs, Counter()

    def counted(index, stage):
        return lambda *args: (ran.update([index]), stage(*args))[1]

    model.decoder._runs = tuple(counted(*pair) for pair in enumerate(run_stage))
    try:
        yield ran
    finally:
        model.decoder._runs = run_stage
    assert ran == {0: 2, 1: 2, 2: 2}, "one prompt at once, and one in two chunks"
    assert key_pages._FOUND, "the layout of keys has been looked up"
    assert torch.equal(model.pool, before)
    assert model.decoder.take_decisions() is None, "nobody is told"


def test_v2_warms_up_every_stage_once_and_leaves_nothing(model, run, state, cold):
    """Not in a dummy run, which vLLM may be measuring."""
    state._is_warm = False
    state.add_request(0, new_request("text"))
    prepare(model, run, state, v2_batch(None, [0], [5]))
    assert not key_pages._FOUND and not cold
    for _ in range(2):
        plan = plan_in(prepare(model, run, state, v2_batch(["text"], [0], [5])))
    assert plan.boundary is None and plan.num_tokens == 5, "the step is the runner's own"


class StartedWorker:
    """The part of a worker that vLLM calls once K/V pages are there."""

    def __init__(self, runner):
        self.model_runner, self.vllm_config = runner, runner.vllm_config

    def compile_or_warm_up_model(self):
        return "times"


def started(runner):
    worker_cls = resolve_obj_by_qualname(routed_worker(f"{__name__}.StartedWorker"))
    return worker_cls(runner).compile_or_warm_up_model()


def test_v1_s_worker_warms_up_every_stage_at_start_and_leaves_nothing(model, cold):
    assert not model.config.use_v2_model_runner
    assert started(runner_of(model)) == "times"


def test_v1_requests_find_their_own_blocks_after_warming_up(model, run):
    batch = Batch(model, run, [0, 3])
    started(batch.runner)
    with batch.planned({"text": 1, "image": NUM_PROMPT}):
        blocks = model.decoder.tables.block_tables[:, 0, : NUM_PROMPT // model.block_size]
        assert blocks.ge(1).all(), "the first request's own"


def test_v2_s_worker_leaves_warming_up_to_its_runner():
    runner = SimpleNamespace(vllm_config=SimpleNamespace(use_v2_model_runner=True))
    assert started(runner) == "times"


def test_a_run_without_metadata_takes_room_for_the_tables(model, monkeypatch):
    """That is when vLLM measures memory; the first builder gives back what was set aside."""
    tables = model.decoder.tables
    monkeypatch.setattr(tables, "allocated", False)
    monkeypatch.setattr(tables, "allocate", lambda **sizes: None)
    model.forward(torch.zeros(4, model.hidden_size), torch.arange(4), None)
    assert tables._set_aside is not None
    monkeypatch.undo()
    for (group,) in model.attn_groups:
        group.create_metadata_builders(model.config, CPU)
    assert tables._set_aside is None
    model.builders[:] = [group.get_metadata_builder() for (group,) in model.attn_groups]


def test_a_request_s_own_budget_is_planned(model, run, state):
    """By both runners."""
    asked = SamplingParams(extra_args={"reroute": {"keep": [1.0, 0.5]}})
    own = replace(new_request("image", [feature(40, 20)]), sampling_params=asked)
    state.add_request(0, own)
    plan = plan_in(prepare(model, run, state, v2_batch(["image"], [0], [NUM_PROMPT])))
    assert plan.seq_lens.tolist() == [[NUM_PROMPT], [NUM_PROMPT], [NUM_PROMPT - 10]]
    batch = Batch(model, run, [0, 3])
    batch.states["image"].sampling_params = asked
    with batch.planned({"text": 1, "image": NUM_PROMPT}):
        assert model.builders[0].step.plan.seq_lens[:, 0].tolist() == plan.seq_lens[:, 0].tolist()


def test_v2_dummy_runs_route_nothing(model, run, state):
    state.add_request(0, new_request("image", [feature(40, 20)]))
    assert plan_in(prepare(model, run, state, v2_batch(None, [0, 0], [30, 5]))) is None
    known = v2_batch(["image"], [0], [30])
    assert plan_in(prepare(model, run, state, known)) is not None
    captured = prepare(model, run, state, v2_batch(None, [0], [1]), for_capture=True)
    assert plan_in(captured) is None


def test_v2_a_step_is_never_taken_for_a_dummy_run(model, run, state):
    state.add_request(0, new_request("image", [feature(40, 20)]))
    with pytest.raises(RuntimeError, match="captured over a batch of real requests"):
        prepare(model, run, state, v2_batch(["image"], [0], [1]), for_capture=True)
    with pytest.raises(RuntimeError, match="an image prefill as a decode step"):
        batch = v2_batch(["image"], [NUM_PROMPT - 1], [1])
        prepare(model, run, state, batch, mode=CUDAGraphMode.FULL)


def test_v2_a_batch_half_known_is_an_error(model, run, state):
    state.add_request(0, new_request("image", [feature(40, 20)]))
    with pytest.raises(RuntimeError, match="not told of"):
        prepare(model, run, state, v2_batch(["image", "stranger"], [0, 0], [30, 5]))
    state.remove_request("image")
    with pytest.raises(RuntimeError, match="not told of: image"):
        prepare(model, run, state, v2_batch(["image"], [0], [5]))
    state.remove_request("image")


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.FULL])
def test_v2_pads_where_a_full_graph_replays(model, run, state, mode):
    state.add_request(0, new_request("text"))
    batch = v2_batch(["text"], [4], [1])
    batch.num_tokens_after_padding = 3
    model.decoder.tables.slot_mappings[:, :4] = 7
    prepare(model, run, state, batch, mode=mode)
    slots = model.decoder.tables.slot_mappings[0, 1:4].tolist()
    assert slots == ([-1, -1, 7] if mode == CUDAGraphMode.FULL else [7, 7, 7])


def test_v2_positions_of_fetched_tokens(model, state):
    places = Places(np.array([1, 1, 0]), np.array([5, 9, 2]))
    batch = v2_batch(["a", "b"], [10, 10], [1, 1])
    batch.idx_mapping_np = np.array([3, 1])
    assert state._positions(batch, places).tolist() == [5, 9, 2]
    table = torch.arange(16 * 3 * 20).view(48, 20).int()
    state.rope_state = SimpleNamespace(prefill_positions=SimpleNamespace(gpu=table), num_dims=3)
    expect = [[int(table[r * 3 + d, p]) for r, p in ((1, 5), (1, 9), (3, 2))] for d in range(3)]
    found = state._positions(batch, places)
    assert found.tolist() == expect and found.dtype == torch.int64
