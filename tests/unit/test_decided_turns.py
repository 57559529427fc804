"""What a worker says of decided turns: to vLLM's scheduler, and on to the answers that asked for it."""

from types import SimpleNamespace

import numpy as np
import pytest
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.worker.worker_base import WorkerBase

from vllm_reroute.kv_cache.decided_turns import DecidedTurns
from vllm_reroute.metrics import carrier
from vllm_reroute.metrics.catalogue import BROUGHT_BACK
from vllm_reroute.plan.decided_turn import DecidedTurn, turns_of
from vllm_reroute.runners.worker import routed_worker
from vllm_reroute.schedule import CONFIG_KEY

from .scheduler_steps import OPTIONS, Steps, image

BACK = (0, 0, 3)


@pytest.fixture(scope="module")
def config(engine_config):
    return engine_config(
        max_num_batched_tokens=64, max_model_len=512, additional_config={CONFIG_KEY: OPTIONS}
    )


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def steps(request, config):
    return Steps(config, asynchronous=request.param)


def turn(end, back=BACK, told=None):
    return DecidedTurn(end=end, brought_back=back, told=told)


def told_in(outputs):
    """Request id -> array, as it reaches a front end in another process."""
    decoder, found = MsgpackDecoder(EngineCoreOutputs), {}
    for of_client in outputs.values():
        for output in decoder.decode(MsgpackEncoder().encode(of_client)).outputs:
            if output.routed_experts is not None:
                found[output.request_id] = output.routed_experts
    return found


def brought_back(outputs):
    (stats,) = (of.scheduler_stats for of in outputs.values() if of.scheduler_stats)
    series = [BROUGHT_BACK.series(str(stage)) for stage in range(3)]
    return [carrier.counts_of(stats).get(name, 0) for name in series]


def test_it_leaves_with_the_next_output_and_is_counted_once(steps):
    """A turn in the middle of a prompt waits for the prompt's first token."""
    steps.add(image("asks", 100, max_tokens=3), image("does not", 20, max_tokens=3))
    told = np.arange(18).reshape(6, 3) % 2 == 0
    steps.schedule()
    first = steps.answer({"asks": turn(40, told=told[:4]), "does not": turn(20)})
    assert told_in(first) == {}
    steps.schedule()
    # The first turn once more, as after a preemption.
    second = steps.answer({"asks": turn(40, told=~told[:4])})
    steps.schedule()
    third = steps.answer({"asks": turn(100, told=told[4:]), "gone": turn(9, told=told)})
    found = [told_in(outputs) for outputs in (second, third)]
    assert [list(of_step) for of_step in found] in ([["asks"], ["asks"]], [[], ["asks"]])
    joined = np.concatenate([of_step["asks"] for of_step in found if of_step])
    np.testing.assert_array_equal(joined, told)
    assert joined.dtype == bool
    steps.finish()
    assert steps.scheduler.decided_turns._told == steps.scheduler.decided_turns._ends == {}


def test_what_an_aborted_request_was_to_be_told_is_dropped(steps):
    steps.add(image("asks", 100), image("other", 20, max_tokens=4))
    steps.schedule()
    steps.answer({"asks": turn(40, told=np.ones((4, 3), bool))})
    steps.scheduler.finish_requests("asks", RequestStatus.FINISHED_ABORTED)
    steps.finish()
    assert steps.scheduler.decided_turns._told == steps.scheduler.decided_turns._ends == {}


def test_a_request_may_end_with_the_step_that_decides(steps):
    steps.add(image("asks", 20, max_tokens=1))
    told = np.zeros((16, 3, 2), np.float32)
    steps.schedule()
    found = told_in(steps.answer({"asks": turn(20, told=told)}))
    np.testing.assert_array_equal(found["asks"], told)
    assert not steps.scheduler.decided_turns._told


def test_tokens_brought_back_are_counted(config):
    steps = Steps(config)
    steps.add(image("a", 20), image("b", 20))
    steps.schedule()
    assert brought_back(steps.answer({"a": turn(20), "b": turn(20, (0, 2, 5))})) == [0, 2, 8]
    steps.schedule()
    assert brought_back(steps.answer({"a": turn(20)})) == [0, 0, 0], "decided again"


class StockWorker(WorkerBase):
    """The part of a worker that hands over what a step leaves."""

    def __init__(self, output, decisions):
        self.output = output
        decoder = SimpleNamespace(take_decisions=lambda: decisions)
        self.model = SimpleNamespace(routed_decoder=decoder)

    def get_model(self):
        return self.model

    def sample_tokens(self, grammar_output):
        return self.output


class Later(AsyncModelRunnerOutput):
    def __init__(self, output):
        self.output = output

    def get_output(self):
        return self.output

    def get_kv_connector_output(self):
        return "what a connector says"


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_a_worker_says_what_its_step_has_decided(later):
    """Asked for the output, not before: the device may still be at it."""
    asked = []
    copied = SimpleNamespace(turns=lambda: asked.append(1) or {1: turn(20)})
    output = ModelRunnerOutput(["a", "b"], {"a": 0, "b": 1})
    worker_cls = resolve_obj_by_qualname(routed_worker(f"{__name__}.StockWorker"))
    assert issubclass(worker_cls, StockWorker)
    found = worker_cls(Later(output) if later else output, copied).sample_tokens(None)
    assert bool(asked) is not later
    if later:
        assert found.get_kv_connector_output() == "what a connector says"
        found = found.get_output()
    assert found is output and turns_of(found) == {"b": turn(20)}
    other = ModelRunnerOutput(["a"], {"a": 0})
    assert worker_cls(other, None).sample_tokens(None) is other and turns_of(other) == {}


def test_a_routed_engine_has_such_a_worker(config, engine_config):
    stock = engine_config().parallel_config.worker_cls
    made = resolve_obj_by_qualname(config.parallel_config.worker_cls)
    assert made.__mro__[2] is resolve_obj_by_qualname(stock)


def test_a_turn_that_looks_back_adds_to_what_was_told():
    """Who runs by any turn, with the score of the latest that ranked it."""
    counts = SimpleNamespace(brought_back=lambda of_stages: None)
    turns = DecidedTurns({"asks", "wants scores"}, counts)
    yes, no, nan = True, False, np.float32(np.nan)

    def scored(runs, scores):
        return np.stack((np.array(runs, np.float32), np.array(scores, np.float32)), axis=-1)

    told = [[yes, no]], [[yes, yes], [yes, no]], [[yes, no], [yes, no], [yes, yes]]
    scores = [[nan, 0.1]], [[nan, 0.5], [nan, 0.2]], [[nan, 0.3], [nan, nan], [nan, 0.4]]
    for end, (runs, ranks) in enumerate(zip(told, scores, strict=True), 1):
        for name, own in (("asks", np.array(runs)), ("wants scores", scored(runs, ranks))):
            of_turn = DecidedTurn(end=end, brought_back=(), told=own, ranks_earlier=end == 3)
            turns.take({name: of_turn})
    outputs = [SimpleNamespace(request_id=name) for name in ("asks", "wants scores")]
    turns.tell({0: SimpleNamespace(outputs=outputs)})
    everyone = [[yes, no], [yes, yes], [yes, yes]]
    assert outputs[0].routed_experts.tolist() == everyone
    latest = scored(everyone, [[nan, 0.3], [nan, 0.5], [nan, 0.4]])
    np.testing.assert_array_equal(outputs[1].routed_experts, latest)
