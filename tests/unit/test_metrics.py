"""What `/metrics` says of routing: counted by vLLM's scheduler, carried and shown as vLLM's own."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import vllm.v1.metrics.loggers as loggers
from prometheus_client import REGISTRY
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_reroute.metrics import carrier
from vllm_reroute.metrics.catalogue import (
    DEFERRED,
    IN_CHUNKS,
    KEPT,
    KV_ALLOCATED,
    KV_DENSE,
    KV_HELD,
    KV_SAVED,
    METRICS,
    PARKED,
    PREFIX_CACHE,
    REQUESTS,
    SEEN,
    Kind,
)
from vllm_reroute.metrics.stat_logger import STAT_LOGGERS
from vllm_reroute.schedule import CONFIG_KEY, RoutingSchedule
from vllm_reroute.schedule.footprint import RequestFootprint

from .parts import feature, make_request
from .scheduler_steps import BLOCK, DEPTH, OPTIONS, Steps, image, text

DOCS = Path(__file__).parents[2] / "docs"
GAUGES = {metric.series(): metric for metric in METRICS if metric.kind is Kind.GAUGE}


@pytest.fixture(scope="module")
def configs(engine_config):
    common = {"max_num_batched_tokens": 64, "max_model_len": 512, "enable_prefix_caching": True}
    return {
        "routed": engine_config(**common, additional_config={CONFIG_KEY: OPTIONS}),
        "stock": engine_config(**common),
    }


class Watched(Steps):
    """Collects the statistics that vLLM sends with the answers of a step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.now, self.counted, self.gauges, self.read_again = 0.0, Counter(), {}, 0
        self.scheduler.counts._clock = lambda: self.now
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.stages = [m for m in managers if m is not self.scheduler.parked_pages]
        self.block_bytes = managers[0].kv_cache_spec.page_size_bytes

    def answer(self, decided=None):
        self.now += 1
        outputs = super().answer(decided)
        (stats,) = (of.scheduler_stats for of in outputs.values() if of.scheduler_stats)
        self.collect(stats)
        return outputs

    def collect(self, stats):
        self.read_again += stats.prefix_cache_stats.preempted_hits
        for name, value in carrier.counts_of(stats).items():
            if name in GAUGES:
                self.gauges[name] = value
            else:
                self.counted[name] += value
        self.check_gauges()

    def check_gauges(self):
        """They say what the pool says."""
        requests = [r for r in self.scheduler.requests.values() if r.mm_features]
        blocks = [m.req_to_blocks.get(r.request_id, ()) for m in self.stages for r in requests]
        pages = self.scheduler.parked_pages.req_to_blocks.values()
        dense = sum(DEPTH * -(-r.num_computed_tokens // BLOCK) for r in requests)
        chunked = sum(0 < r.num_computed_tokens < r.num_prompt_tokens for r in requests)
        assert self.gauges == {
            KV_HELD.series(): sum(map(len, blocks)) * self.block_bytes,
            KV_DENSE.series(): dense * self.block_bytes,
            PARKED.series(): sum(not b.is_null for held in pages for b in held) * self.block_bytes,
            IN_CHUNKS.series(): chunked,
        }


def asking(request, **options):
    request.sampling_params.extra_args = {"reroute": options}
    return request


def footprints(schedule, bytes_per_token, *requests):
    """Footprints of requests of one picture, from (prompt tokens, visual tokens, answer tokens)."""
    return [
        RequestFootprint(
            schedule=schedule,
            num_visual=visual,
            # The last token of an answer has no K/V.
            num_text=prompt - visual + answer - 1,
            bytes_per_token=bytes_per_token,
            block_size=BLOCK,
        )
        for prompt, visual, answer in requests
    ]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_counts_are_those_of_the_requests(configs, asynchronous):
    """One in chunks, one with a budget of its own, one that wants to keep everything, and text."""
    steps = Watched(configs["routed"], asynchronous=asynchronous)
    steps.add(
        text("t", 70, max_tokens=3),
        asking(image("long", 130, length=40, max_tokens=6), history="rerank"),
        asking(image("own", 30, max_tokens=20), keep=[1.0, 0.5]),
        asking(image("dense", 30, max_tokens=20), schedule="none"),
        image("aborted", 40),
    )
    while not steps.scheduler.requests["aborted"].num_output_tokens:
        steps.run()
    # While a step is under way whose token nobody will see: it is no part of the footprint.
    steps.schedule()
    steps.scheduler.finish_requests("aborted", RequestStatus.FINISHED_ABORTED)
    steps.finish()
    schedule = RoutingSchedule.of(configs["routed"])
    asked = [
        (schedule, (130, 40, 6)),
        (schedule_with(schedule, (1.0, 0.5)), (30, 16, 20)),
        (schedule_with(schedule, (1.0, 1.0)), (30, 16, 20)),
        (schedule, (40, 16, 1)),
    ]
    of_requests = [
        footprints(own, steps.block_bytes // BLOCK, request)[0] for own, request in asked
    ]
    held = sum(one.routed_bytes for one in of_requests)
    visual = sum(one.num_visual for one in of_requests)
    kept = [sum(of_stage) for of_stage in zip(*(one.kept for one in of_requests), strict=True)]
    assert kept == [88, 60, 38]
    assert steps.counted == {
        REQUESTS.series("custom", "server"): 2,
        REQUESTS.series("custom", "request"): 1,
        REQUESTS.series("none", "request"): 1,
        **{SEEN.series(str(i)): visual for i in range(3)},
        **{KEPT.series(str(i)): n for i, n in enumerate(kept)},
        **{DEFERRED.series(str(i)): visual - n for i, n in enumerate(kept)},
        KV_ALLOCATED.series(): held,
        KV_SAVED.series(): sum(one.dense_bytes for one in of_requests) - held,
    }
    assert not any(steps.gauges.values())


def schedule_with(schedule, keep):
    return RoutingSchedule.from_dict({**schedule.to_dict(), "keep": keep})


def test_a_preempted_request_counts_once(configs):
    """The gauges, checked after every step, know that it holds nothing meanwhile."""
    steps = Watched(configs["routed"], units=6, parked_units=2)
    steps.add(image("a", 30, max_tokens=60), image("b", 30, max_tokens=60))
    b = steps.scheduler.requests["b"]
    steps.finish()
    assert b.num_preemptions
    assert steps.counted[REQUESTS.series("custom", "server")] == 2
    assert steps.counted[SEEN.series("1")] == 32


def test_a_prompt_preempted_in_the_middle_is_not_under_way(configs):
    """Nor does it count, as in vLLM's own figure, what it then finds of itself in the cache."""
    steps = Watched(configs["routed"])
    steps.add(text("t", 60, max_tokens=100), image("i", 100, max_tokens=4))
    steps.run()
    steps.run()
    assert steps.gauges[IN_CHUNKS.series()] == 1
    i = steps.scheduler.requests["i"]
    steps.scheduler.running.remove(i)
    steps.scheduler._preempt_request(i, 0.0)
    steps.now += 1
    steps.collect(steps.scheduler.make_stats())
    assert steps.gauges[IN_CHUNKS.series()] == 0
    steps.finish()
    assert steps.read_again
    assert not any(name.startswith(PREFIX_CACHE.name) for name in steps.counted)


def test_a_request_given_up_before_its_decisions_counts_nothing(configs):
    steps = Watched(configs["routed"])
    steps.add(image("i", 100))
    steps.run()
    steps.scheduler.finish_requests("i", RequestStatus.FINISHED_ABORTED)
    steps.add(text("t", 10, max_tokens=1))
    steps.finish()
    assert not steps.counted and not any(steps.gauges.values())


def test_cached_tokens_are_told_apart_and_add_up_to_vllms_own_count(configs):
    """Behind 32 tokens of text everything is read in the first stage alone."""
    steps = Watched(configs["routed"])
    shared = feature(40, 16, name="shared")
    for name, tail in (("first", 20), ("again", 24)):
        steps.add(make_request(name, 56 + tail, [shared], max_tokens=1))
        steps.finish()
    steps.add(text("t", 40, max_tokens=1))
    steps.finish()
    counted = [steps.counted[PREFIX_CACHE.series(reach)] for reach in ("all_stages", "first_stage")]
    assert counted == [32 + 32, 32]


def test_what_live_requests_hold_is_added_up_once_a_second(configs, monkeypatch):
    """A step in between costs no look at them."""
    steps = Watched(configs["routed"])
    steps.add(image("i", 40, max_tokens=40))
    for _ in range(3):
        steps.run()
    counts, looked = steps.scheduler.counts, []
    add_up = counts._add_up
    monkeypatch.setattr(counts, "_add_up", lambda: looked.append(1) or add_up())
    for now in (3.1, 3.9, 4.0, 4.5, 5.1):
        steps.now = now
        counts.take()
    assert len(looked) == 2


@pytest.fixture
def manager(monkeypatch):
    """vLLM's statistics loggers for two engines, as a front end of a routed engine makes them."""
    monkeypatch.setattr(loggers.StatLoggerManager, "__init__", loggers.StatLoggerManager.__init__)
    STAT_LOGGERS.install()

    def make(config):
        made = loggers.StatLoggerManager(config, [0, 1])
        made.log_engine_initialized()
        return made

    yield make
    loggers.unregister_vllm_metrics()


def shown():
    """By sample name and our own labels, engine by engine: everything of ours that is not zero."""
    return {
        (sample.name, *(v for k, v in sample.labels.items() if k != "model_name")): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("vllm:reroute") and not sample.name.endswith("_created")
        if sample.value
    }


def test_counts_reach_the_front_end_that_shows_them(configs, manager):
    """Encoded and decoded as between vLLM's processes; counters add up, gauges are replaced."""
    front_end = manager(configs["routed"])
    decoder = MsgpackDecoder(EngineCoreOutputs)
    for engine, counts in (
        (0, {REQUESTS.series("custom", "server"): 2, KV_HELD.series(): 2**40}),
        (1, {KEPT.series("2"): 7, IN_CHUNKS.series(): 3}),
        (0, {REQUESTS.series("custom", "server"): 1, KV_HELD.series(): 5}),
        (1, {}),
    ):
        stats = SchedulerStats()
        carrier.send(stats, counts)
        sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
        front_end.record(decoder.decode(sent).scheduler_stats, None, engine_idx=engine)
    assert shown() == {
        ("vllm:reroute_requests_total", "0", "custom", "server"): 3,
        ("vllm:reroute_kv_bytes_held", "0"): 5,
        ("vllm:reroute_visual_tokens_kept_total", "1", "2"): 7,
        ("vllm:reroute_prompts_in_chunks", "1"): 3,
    }


def test_every_count_of_a_scheduler_is_shown(configs, manager):
    """A name that nobody shows would end the front end."""
    front_end = manager(configs["routed"])
    for metric in METRICS:
        for values in metric.values(RoutingSchedule.of(configs["routed"])):
            stats = SchedulerStats()
            carrier.send(stats, {metric.series(*values): 1})
            front_end.record(stats, None)
    assert len(shown()) == sum(
        len(metric.values(RoutingSchedule.of(configs["routed"]))) for metric in METRICS
    )


def test_an_engine_without_routing_shows_nothing_of_it(configs, manager):
    manager(configs["stock"])
    names = {family.name for family in REGISTRY.collect()}
    assert "vllm:num_requests_running" in names
    assert not any("reroute" in name for name in names)


@pytest.fixture
def known(configs, manager):
    """Every sample name that a routed front end shows, vLLM's own among them."""
    manager(configs["routed"])
    return {sample.name for family in REGISTRY.collect() for sample in family.samples}


def ours(known):
    return {name for name in known if "reroute" in name and not name.endswith("_created")}


def test_the_dashboard_shows_what_there_is(known):
    """All metrics of ours, and of vLLM's only those it has."""
    dashboard = json.loads((DOCS / "grafana" / "vllm-reroute.json").read_text(encoding="utf-8"))
    shown = [
        set(re.findall(r"vllm:\w+", target["expr"]))
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]
    assert all(shown), "a panel without a metric"
    assert set().union(*shown) <= known
    assert ours(known) <= set().union(*shown)
    assert set(re.findall(r"vllm:\w+", json.dumps(dashboard["templating"]))) <= known


def test_the_documentation_has_a_row_for_each(known):
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \|(.*?)\| (\w+) \|", text, flags=re.MULTILINE)
    documented = {name: (re.findall(r"`(\w+)`", labels), kind) for name, labels, kind in rows}
    assert set(documented) == ours(known)
    assert documented == {
        metric.name + "_total" * (metric.kind is Kind.COUNTER): ([*metric.labels], metric.kind)
        for metric in METRICS
    }
