"""Step tables of vLLM's scheduler with routing: what runs in which step, and with which blocks."""

import random

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from vllm_reroute.kv_cache.scheduler import RoutedAsyncScheduler, RoutedScheduler
from vllm_reroute.schedule import CONFIG_KEY, RoutingSchedule

from .parts import VISUAL, feature, make_request
from .scheduler_steps import BLOCK, DEPTH, OPTIONS, PAGES, Steps, image, text

BUDGET = 64


@pytest.fixture(scope="module")
def configs(engine_config):
    """vLLM's config with and without routing; steps of `BUDGET` tokens."""
    common = {"max_num_batched_tokens": BUDGET, "max_model_len": 512, "enable_prefix_caching": True}
    keeps = {**OPTIONS, "history": "keep", "turn_marker": "ASSISTANT:"}
    return {
        "routed": engine_config(**common, additional_config={CONFIG_KEY: OPTIONS}),
        "keeps": engine_config(**common, additional_config={CONFIG_KEY: keeps}),
        "stock": engine_config(**common),
    }


@pytest.fixture
def limited(configs):
    """The routed config with other limits of a step, for this test only."""
    scheduler_config = configs["routed"].scheduler_config
    before = {}

    def limit(**limits):
        for name, value in limits.items():
            before[name] = getattr(scheduler_config, name)
            setattr(scheduler_config, name, value)
        return configs["routed"]

    yield limit
    for name, value in before.items():
        setattr(scheduler_config, name, value)


# Requests in order of arrival -> what runs in the first steps, of 64 tokens each.
TABLE = {
    "an image that fits": ([image("i", 40)], [{"i": 40}, {"i": 1}]),
    "an image that fits exactly": ([image("i", BUDGET)], [{"i": BUDGET}, {"i": 1}]),
    "text is cut": ([text("t", 150)], [{"t": 64}, {"t": 64}, {"t": 22}, {"t": 1}]),
    "an image is cut just so": ([image("i", 150)], [{"i": 64}, {"i": 64}, {"i": 22}, {"i": 1}]),
    "also inside": (
        [text("t", 10), image("i", 100, at=(50,))],
        [{"t": 10, "i": 54}, {"t": 1, "i": 46}, {"t": 1, "i": 1}],
    ),
    "an image takes what a text chunk leaves": (
        [text("t", 100), image("i", 40)],
        [{"t": 64}, {"t": 36, "i": 28}, {"t": 1, "i": 12}, {"t": 1, "i": 1}],
    ),
    "text fills up what an image leaves": (
        [image("i", 40), text("t", 100)],
        [{"i": 40, "t": 24}, {"i": 1, "t": 63}, {"i": 1, "t": 13}, {"i": 1, "t": 1}],
    ),
    "chunks run beside decodes": (
        [text("t", 10), image("i", 150)],
        [{"t": 10, "i": 54}, {"t": 1, "i": 63}, {"t": 1, "i": 33}, {"t": 1, "i": 1}],
    ),
    "a prompt of nearly a step does not wait for running requests": (
        [text("t", 10), image("i", BUDGET), text("late", 10, first=500)],
        [{"t": 10, "i": 54}, {"t": 1, "i": 10, "late": 10}, {"t": 1, "i": 1, "late": 1}],
    ),
    "several images, a decision": (
        [text("t", 30), image("i", 120, at=(0, 20, 80))],
        [{"t": 30, "i": 34}, {"t": 1, "i": 63}, {"t": 1, "i": 23}, {"t": 1, "i": 1}],
    ),
    "two decisions that fit a step side by side": (
        [image("i", 30), image("j", 32)],
        [{"i": 30, "j": 32}, {"i": 1, "j": 1}],
    ),
    "a decision too many stops before its last tokens": (
        [image("i", 30), image("j", 33), text("t", 10)],
        [{"i": 30, "j": 31, "t": 3}, {"i": 1, "j": 2, "t": 7}, {"i": 1, "j": 1, "t": 1}],
    ),
    "what was not decided goes first in the next step": (
        [*(image(name, 20, at=(2,)) for name in "ij"), image("k", 22), image("l", 20, at=(2,))],
        [
            {"i": 20, "j": 20, "k": 20, "l": 4},
            {"i": 1, "j": 1, "k": 2, "l": 16},
            {"i": 1, "j": 1, "k": 1, "l": 1},
        ],
    ),
    "an image leaves no single token": ([image("i", 65)], [{"i": 63}, {"i": 2}, {"i": 1}]),
    "nor is one run": (
        [text("t", 63), image("i", 40, at=(0,))],
        [{"t": 63}, {"t": 1, "i": 40}, {"t": 1, "i": 1}],
    ),
    "nor left before another image": (
        [image("i", 120, at=(2, 65, 90))],
        [{"i": 63}, {"i": 57}, {"i": 1}],
    ),
    "but text before it may be": (
        [text("t", 63, first=500), image("i", 40, at=(20,))],
        [{"t": 63, "i": 1}, {"t": 1, "i": 39}, {"t": 1, "i": 1}],
    ),
    "one prompt longer than a step decides alone": (
        [image("i", 70), image("j", 22)],
        [{"i": 64}, {"i": 6, "j": 20}, {"i": 1, "j": 2}],
    ),
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("requests,expect", TABLE.values(), ids=TABLE)
def test_steps(configs, requests, expect, asynchronous):
    steps = Steps(configs["routed"], asynchronous=asynchronous)
    fresh = [
        make_request(r.request_id, r.prompt_token_ids, r.mm_features, max_tokens=r.max_tokens)
        for r in requests
    ]
    steps.add(*fresh)
    assert [steps.run() for _ in expect] == expect
    steps.finish()


LIMITS = {
    "nobody waits for a long image": (
        {"long_prefill_token_threshold": 40},
        [image("i", 150), text("t", 10)],
        [{"i": 40, "t": 10}, {"i": 40, "t": 1}, {"i": 40, "t": 1}, {"i": 30, "t": 1}],
    ),
    "nor an image for another": (
        {"long_prefill_token_threshold": 24},
        [image("i", 100), image("j", 30)],
        [
            {"i": 24, "j": 24},
            {"i": 24, "j": 6},
            {"i": 24, "j": 1},
            {"i": 24, "j": 1},
            {"i": 4, "j": 1},
        ],
    ),
    "alone it has the step to itself": (
        {"long_prefill_token_threshold": 40},
        [image("i", 100)],
        [{"i": 64}, {"i": 36}],
    ),
    "both reach their last token": (
        {"long_prefill_token_threshold": 32},
        [image("i", 100), image("j", 100)],
        [{"i": 32, "j": 32}] * 3 + [{"i": 4, "j": 2}, {"i": 1, "j": 2}, {"i": 1, "j": 1}],
    ),
    "fewer tokens than a batch holds": (
        {"max_num_scheduled_tokens": 20},
        [image("i", 50), text("t", 10)],
        [{"i": 20}, {"i": 20}, {"i": 10, "t": 10}, {"i": 1, "t": 1}],
    ),
    "and decisions by them": (
        {"max_num_scheduled_tokens": 30},
        [image("i", 24), image("j", 24)],
        [{"i": 24, "j": 6}, {"i": 1, "j": 18}, {"i": 1, "j": 1}],
    ),
}


@pytest.mark.parametrize("limits,requests,expect", LIMITS.values(), ids=LIMITS)
def test_limits_of_a_step_are_honoured(limited, limits, requests, expect):
    steps = Steps(limited(**limits))
    steps.add(*(make_request(r.request_id, r.prompt_token_ids, r.mm_features) for r in requests))
    assert [steps.run() for _ in expect] == expect
    steps.finish()


@pytest.mark.parametrize(
    "asynchronous,expect", [(False, RoutedScheduler), (True, RoutedAsyncScheduler)]
)
def test_the_scheduler_fits_the_engine(configs, asynchronous, expect):
    scheduler = Steps(configs["routed"], asynchronous=asynchronous).scheduler
    assert type(scheduler) is expect and isinstance(
        scheduler, AsyncScheduler if asynchronous else Scheduler
    )
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    assert len(managers) == 4 and scheduler.parked_pages is managers[-1]
    assert all(manager.live is scheduler.live for manager in managers)
    assert scheduler.live.requests is scheduler.requests


def test_an_image_runs_a_step_behind_with_asynchronous_scheduling(configs):
    """The next step is scheduled before the answer to the last one is known."""
    steps = Steps(configs["routed"], asynchronous=True)
    steps.add(text("t", 90), image("i", 40))
    seen = [steps.schedule()]
    for _ in range(4):
        seen.append(steps.schedule())
        steps.answer()
    assert seen == [{"t": 64}, {"t": 26, "i": 38}, *[{"t": 1, "i": 2}], *[{"t": 1, "i": 1}] * 2]


@pytest.mark.parametrize("finished", [True, False])
def test_an_image_prompt_goes_on_where_the_cache_ends(configs, finished):
    """The same picture and another question: what vLLM counts and reports as cached, too."""
    steps = Steps(configs["routed"])
    picture = feature(35, VISUAL, name="shared")
    steps.add(make_request("a", 60, [picture], max_tokens=1 if finished else 64))
    assert steps.run() == {"a": 60}
    steps.add(make_request("b", [*range(55), 901, 902, 903, 904, 905], [picture]))
    assert steps.schedule()["b"] == 12
    assert steps.worker.num_reused == 48 and steps.worker.num_fetched == 16
    assert steps.scheduler.kv_cache_manager.prefix_cache_stats.hits == 48
    request = steps.scheduler.requests["b"]
    assert request.num_computed_tokens == 60 and request.prefill_stats.num_local_cached_tokens == 48
    steps.answer()
    steps.finish()


def test_a_conversation_that_begins_otherwise_goes_on_where_the_cache_ends(configs):
    """What its first question does not decide was left behind by a prompt of two turns, and written."""
    steps = Steps(configs["keeps"])
    marker = [*RoutingSchedule.of(configs["keeps"]).marker]
    picture = feature(20, VISUAL, name="shared")
    first = [*range(48), *marker]
    steps.add(make_request("a", [*first, 7, 8, *marker], [picture], max_tokens=1))
    steps.finish()
    steps.add(make_request("b", [*range(45), 9, *marker], [picture]))
    steps.run()
    assert steps.worker.num_reused == 32 and steps.worker.num_fetched == 16
    steps.finish()


def test_two_that_share_a_picture_may_begin_in_one_step(configs):
    """The second reads what the first writes in the very same step."""
    steps = Steps(configs["routed"])
    picture = feature(20, VISUAL, name="shared")
    steps.add(make_request("a", 50, [picture]), make_request("b", [*range(40), 7, 8, 9], [picture]))
    assert steps.run() == {"a": 50, "b": 9}, "b stops before its last tokens: 2 x 50 > 64"
    assert steps.run() == {"a": 1, "b": 2}
    assert steps.worker.num_fetched == 25, "16 of a, 9 of its own"
    steps.finish()


def test_a_cached_prompt_waits_whole_for_its_decision(configs):
    """All but the last two tokens are cached, and the step decides about another already."""
    steps = Steps(configs["routed"])
    steps.add(make_request("first", 50, [feature(5, VISUAL, name="shared")], max_tokens=1))
    steps.finish()
    steps.add(*(make_request(name, 50, [feature(5, VISUAL, name="shared")]) for name in "ab"))
    assert [steps.run() for _ in range(2)] == [{"a": 2}, {"a": 1, "b": 2}]
    steps.finish()


def test_who_waits_for_its_decision_holds_no_place_in_the_encoder_cache(configs):
    """Its last tokens belong to the picture's placeholder, but are no visual tokens."""

    def ask(name, **options):
        separators = [1] * VISUAL + [0] * 29
        return make_request(name, 50, [feature(5, 45, separators, name="shared")], **options)

    steps = Steps(configs["routed"], encoder_cache=VISUAL)
    steps.add(ask("first", max_tokens=1))
    steps.finish()
    steps.add(ask("a"), ask("b"))
    assert steps.run() == {"a": 2}, "`check_waiting` has looked at b"
    steps.finish()


def test_text_before_an_image_runs_while_the_vision_encoder_is_busy(configs):
    """As in stock vLLM."""
    steps = Steps(configs["routed"])
    steps.scheduler.max_num_encoder_input_tokens = VISUAL
    steps.add(image("i", 30), image("j", 30))
    assert [steps.run() for _ in range(3)] == [
        {"i": 30, "j": 5},
        {"i": 1, "j": 25},
        {"i": 1, "j": 1},
    ]
    steps.finish()


def test_a_full_encoder_cache_stops_nobody(configs):
    """One of its two pictures is cached, the other waits for room; others overtake and go on."""
    steps = Steps(configs["routed"], asynchronous=True, encoder_cache=2 * VISUAL)
    shared = feature(5, VISUAL, name="shared")
    steps.add(make_request("first", 40, [shared], max_tokens=1))
    steps.finish()
    steps.add(
        image("full", 40, max_tokens=5),
        make_request("a", 60, [shared, feature(25, VISUAL, name="new")], max_tokens=5),
        image("b", 40, at=(5,), max_tokens=5),
    )
    steps.schedule()
    steps.schedule()
    steps.scheduler.reset_prefix_cache(reset_running_requests=True)
    while steps.scheduler.has_unfinished_requests():
        before = len(steps.in_flight)
        scheduled = steps.schedule()
        assert scheduled or before, "nothing runs and nothing is awaited"
        steps.answer()


@pytest.mark.parametrize("caching", [False, True])
def test_a_preempted_image_request_comes_back(configs, caching):
    """Two image requests outgrow the pool; the later one runs its prompt again, chunk by chunk."""
    steps = Steps(configs["routed"], units=6, parked_units=2, caching=caching)
    steps.add(image("a", 30, max_tokens=60), image("b", 30, max_tokens=60))
    b = steps.scheduler.requests["b"]
    resumed = []
    while steps.scheduler.has_unfinished_requests():
        preempted = b.num_preemptions
        if steps.run().get("b", 0) > 1 and preempted:
            resumed.append(b.num_tokens)
    assert b.num_preemptions and resumed and b.num_output_tokens == 60
    assert steps.pool.get_num_free_blocks() == steps.capacity


def test_a_long_image_prompt_is_preempted_in_the_middle_and_goes_on(configs):
    """With the prefix cache it finds its own parked states again."""
    steps = Steps(configs["routed"])
    steps.add(text("t", 60, max_tokens=100), image("i", 100, max_tokens=4))
    steps.run()
    i = steps.scheduler.requests["i"]
    steps.run()
    before = i.num_computed_tokens
    assert 32 < before < 100 and steps.scheduler.parked_pages.holders == ["i"]
    steps.scheduler.running.remove(i)
    steps.scheduler._preempt_request(i, 0.0)
    assert not steps.scheduler.parked_pages.holders
    steps.run()
    assert i.num_computed_tokens > before // BLOCK * BLOCK
    steps.finish()


def test_what_a_preempted_step_was_to_write_is_not_found(limited):
    """With priorities vLLM may drop a chunk it has just planned: `low` must not find it written."""
    config = limited(policy="priority", long_prefill_token_threshold=32)
    steps = Steps(config, units=20)
    steps.add(text("mid", 100, first=800, priority=1, arrival_time=0.0, max_tokens=12))
    for _ in range(3):
        steps.run()
    steps.add(text("low", 200, priority=2, arrival_time=1.0, max_tokens=3))
    low = steps.scheduler.requests["low"]
    steps.run()
    steps.add(text("high", 13, first=500, priority=0, arrival_time=2.0, max_tokens=60))
    steps.finish()
    assert low.num_preemptions and low.num_output_tokens == 3


def test_a_resumed_request_longer_than_a_step_decides_as_before(configs):
    steps = Steps(configs["routed"])
    steps.add(image("i", 50, max_tokens=100))
    for _ in range(31):
        steps.run()
    request = steps.scheduler.requests["i"]
    assert request.num_tokens == 81
    steps.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert request.status is RequestStatus.PREEMPTED
    steps.add(text("t", 20))
    assert [steps.run() for _ in range(3)] == [{"i": 64}, {"i": 17, "t": 20}, {"i": 1, "t": 1}]
    steps.finish()


def test_who_found_its_picture_in_the_cache_can_still_run_it(configs):
    """It is preempted and all that was cached is gone, the vision encoder's output, too."""
    steps = Steps(configs["routed"])
    picture = feature(5, 16, name="i")
    for name in ("first", "again"):
        steps.add(make_request(name, 50, [picture], max_tokens=20 if name == "again" else 1))
        steps.run()
    assert steps.worker.num_reused > 5 + 16
    steps.scheduler.reset_prefix_cache(reset_running_requests=True)
    steps.scheduler.encoder_cache_manager.reset()
    # The worker checks that it has been given what it is to encode.
    assert steps.run() == {"again": 51}
    steps.finish()


@pytest.mark.parametrize("caching", [False, True])
def test_pages_are_released_right_after_the_step_that_decides(configs, caching):
    """Before its answer is known: the next step may have them."""
    steps = Steps(configs["routed"], caching=caching)
    steps.add(image("i", 100))
    held = []
    for _ in range(3):
        steps.schedule()
        blocks = steps.scheduler.parked_pages.req_to_blocks.get("i", ())
        held.append(sum(not block.is_null for block in blocks))
        steps.answer()
    assert held == [PAGES * 4, 0, 0]
    steps.finish()


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_an_abort_frees_every_block(configs, after):
    steps = Steps(configs["routed"])
    steps.add(image("i", 90), text("t", 100), image("j", 40))
    for _ in range(after):
        steps.run()
    steps.scheduler.finish_requests(["i", "t", "j"], RequestStatus.FINISHED_ABORTED)
    assert steps.pool.get_num_free_blocks() == steps.capacity
    assert not steps.scheduler.has_unfinished_requests()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_any_traffic_is_planned_and_ends(configs, seed, caching, asynchronous):
    """A small pool and random arrivals: chunks, preemptions, resumes. `Steps.check` runs in each step."""
    rng = random.Random(seed)
    steps = Steps(
        configs["routed"], units=14, parked_units=10, caching=caching, asynchronous=asynchronous
    )
    arrivals = []
    for i in range(20):
        max_tokens = rng.randint(1, 70)
        if rng.random() < 0.6:
            num_images = rng.randint(1, 2)
            num_tokens = rng.randint(num_images * 20, 150)
            at = range(0, num_images * 20, 20)
            name = rng.choice((f"i{i}", "shared"))
            pictures = [feature(p + rng.randint(0, 3), VISUAL, name=f"{name}-{p}") for p in at]
            arrivals.append(make_request(f"i{i}", num_tokens, pictures, max_tokens=max_tokens))
        else:
            arrivals.append(text(f"t{i}", rng.randint(1, 120), max_tokens=max_tokens))
    for request in arrivals:
        steps.add(request)
        for _ in range(rng.randint(0, 12)):
            steps.run()
    steps.finish()
    assert all(request.num_output_tokens == request.max_tokens for request in arrivals)
    assert any(request.num_preemptions for request in arrivals), "the pool was meant to be short"


@pytest.mark.parametrize("units,caching", [(100, True), (100, False), (12, True), (12, False)])
@pytest.mark.parametrize("seed", range(4))
def test_text_is_scheduled_as_by_stock_vllm(configs, seed, units, caching):
    """Side by side on the same requests: same tokens in the same steps, same share of the pool."""
    rng = random.Random(seed)
    routed, stock = (
        Steps(configs[kind], units=units, caching=caching) for kind in ("routed", "stock")
    )
    requests = []
    for i in range(20):
        shared, own = rng.randint(0, 100), rng.randint(1, 50)
        prompt, max_tokens = [*range(shared), *[900 + i] * own], rng.randint(1, 40)
        for steps in (routed, stock):
            requests.append(make_request(f"r{i}", prompt, max_tokens=max_tokens))
            steps.add(requests[-1])
        for _ in range(rng.randint(0, 10)):
            assert routed.run() == stock.run()
            assert routed.pool.get_num_free_blocks() == DEPTH * stock.pool.get_num_free_blocks()
    assert routed.finish() == stock.finish()
    assert routed.created == stock.created and any(stock.created.values()) is caching
    assert any(request.num_preemptions for request in requests) is (units == 12)


@pytest.mark.parametrize("kind", ["stock", "routed"])
def test_an_eviction_shortens_a_cached_prefix_as_in_stock_vllm(configs, kind):
    """Of 30 cached units, 3 are evicted for a request that needs 13 of 10 free ones."""
    steps = Steps(configs[kind], units=40)
    for name, num_tokens, first in (("conversation", 480, 0), ("in between", 200, 1000)):
        steps.add(text(name, num_tokens, first, max_tokens=1))
        steps.finish()
    _, num_hit, _ = steps.scheduler.kv_cache_manager.get_computed_blocks(text("next turn", 490))
    assert num_hit == 480 - 3 * BLOCK


def test_pages_of_parked_states_are_evicted_before_what_they_stand_for(configs):
    """A request's pages are free before its other blocks, so they are the first to go: its picture
    has to be run again then, its text has not."""
    steps = Steps(configs["routed"])
    picture = feature(35, VISUAL, name="shared")
    steps.add(make_request("i", 60, [picture], max_tokens=1))
    steps.finish()
    cached = {block.block_id for block in steps.pool.blocks if block.block_hash is not None}
    never_used = steps.capacity - len(cached)
    steps.pool.get_new_blocks(never_used + PAGES)
    lost = {block for block in cached if steps.pool.blocks[block].block_hash is None}
    tags = [steps.worker.tags[block] for block in sorted(lost)]
    assert sorted(tags) == [(steps.worker.parked, page) for page in range(PAGES)]
    again = make_request("again", 60, [picture])
    _, num_hit, _ = steps.scheduler.kv_cache_manager.get_computed_blocks(again)
    assert num_hit == 32


def test_routed_requests_leave_room_for_more(configs):
    """As many image requests run at once as their routed blocks allow, more than a dense cache holds."""
    per_request = 3 * 3 + 2 * 2 + 3 * 2  # layers x blocks of 12 text and 32, 16 and 8 visual tokens
    dense = DEPTH * 3
    steps = Steps(configs["routed"], units=10)
    assert (steps.capacity // dense, steps.capacity // per_request) == (3, 4)
    steps.add(*(image(f"i{n}", 44, at=(0, 20), max_tokens=5) for n in range(8)))
    running = []
    while steps.scheduler.has_unfinished_requests():
        steps.run()
        running.append(len(steps.scheduler.running))
    assert max(running) == 4
