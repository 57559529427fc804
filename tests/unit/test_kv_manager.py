"""Blocks of live requests, counted in vLLM's own pool, managers and coordinator."""

import random
from collections import Counter

import pytest
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator

from vllm_reroute.kv_cache.parked_manager import ParkedManager
from vllm_reroute.kv_cache.stage_manager import StageManager
from vllm_reroute.schedule import RerouteOptions
from vllm_reroute.schedule.footprint import RequestFootprint
from vllm_reroute.schedule.published import ACTIONS, SCHEDULES, TIERS

from .kv_engine import BLOCK, DEPTH, PAGES, SCHEDULE, Engine, text, with_image
from .parts import feature, make_request

LAYERS = [stage.num_layers for stage in SCHEDULE.stages]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_text,num_visual", [(104, 576), (8, 576), (33, 1152), (20, 1)])
@pytest.mark.parametrize("chunk", [None, 100])
def test_a_live_request_holds_its_footprint(name, action, tier, num_text, num_visual, chunk):
    """Once its decisions are taken, whether its prompt ran whole or in chunks."""
    schedule = RerouteOptions(schedule=name, action=action, tier=tier).resolve(32)
    engine = Engine(schedule, num_blocks=6000, step=chunk or 4096)
    request = with_image("r", num_text + num_visual, feature(5, num_visual))
    engine.prefill(request, chunk and min(chunk, request.num_tokens))
    while chunk and request.num_computed_tokens < request.num_tokens:
        engine.run(request, min(chunk, request.num_tokens - request.num_computed_tokens))
    ids = engine.manager.get_block_ids("r")
    footprint = RequestFootprint(
        schedule=schedule,
        num_visual=num_visual,
        num_text=num_text,
        bytes_per_token=1,
        block_size=BLOCK,
    )
    assert sum(map(len, ids)) == footprint.routed_blocks
    assert engine.pool.get_num_free_blocks() == 5999 - footprint.routed_blocks


def test_every_layer_has_blocks_of_its_own():
    engine = Engine(caching=False)
    requests = [with_image("a"), text("b", 70, first=500), with_image("in chunks")]
    chunks = [None, None, 60]
    ids = [
        block
        for request, chunk in zip(requests, chunks, strict=True)
        for group in engine.prefill(request, chunk)[0]
        for block in group
    ]
    null_block = ids.count(0)
    assert null_block == PAGES * 2, "a parked table begins where the text prefix ends"
    assert len(ids) - null_block == len(set(ids) - {0})


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(
    "request_", [text("r", 30), with_image("r"), with_image("r", 88, feature(0, 64))]
)
def test_decode_takes_a_block_per_layer_at_a_boundary_and_none_elsewhere(request_, caching):
    request = make_request("r", request_.num_prompt_tokens, request_.mm_features, block_size=BLOCK)
    engine = Engine(caching=caching)
    engine.prefill(request)
    routing = engine.live.of(request)
    grew = Counter()
    for _ in range(40):
        before, num_tokens = engine.held(request), request.num_computed_tokens
        new = engine.decode(request)
        for stage, layers in enumerate(LAYERS):
            length = routing.kv_length(stage, num_tokens) if routing else num_tokens
            crosses = length % BLOCK == 0
            assert len(new[stage]) == (layers if crosses else 0)
            assert engine.held(request)[stage] == before[stage] + len(new[stage])
            grew[stage] += crosses
        assert not new[engine.parked.kv_cache_group_id]
    assert all(2 <= grew[stage] <= 3 for stage in range(3))


@pytest.mark.parametrize("caching", [True, False])
def test_finishing_returns_every_block(caching):
    engine = Engine(caching=caching)
    free = engine.pool.get_num_free_blocks()
    requests = [with_image("a"), text("b", 70), text("c", 70), with_image("d")]
    for request in requests:
        engine.prefill(request)
    for request in requests[::2]:
        for _ in range(20):
            engine.decode(request)
    for request in requests:
        engine.finish(request)
    assert engine.pool.get_num_free_blocks() == free
    for manager in (*engine.stages, engine.parked):
        assert not manager.req_to_blocks and not manager.num_cached_block
    assert engine.manager.reset_prefix_cache()


def test_a_request_unknown_to_the_pool_may_be_freed():
    engine = Engine()
    engine.manager.free(with_image("aborted before it ran"))
    assert engine.pool.get_num_free_blocks() == 1999


# Tokens shared with an earlier request, tokens of the later one -> tokens found cached.
@pytest.mark.parametrize(
    "shared,num_tokens,hit",
    [
        (50, 60, 48),
        (40, 60, 32),
        (48, 60, 48),
        (48, 49, 48),
        (48, 48, 32),
        (15, 60, 0),
        (50, 33, 32),
        (0, 60, 0),
    ],
)
@pytest.mark.parametrize("while_running", [True, False])
def test_text_finds_the_same_prefix(shared, num_tokens, hit, while_running):
    engine = Engine()
    first = text("first", 50)
    first_ids, _ = engine.prefill(first)
    if not while_running:
        engine.finish(first)
    second = make_request(
        "second", [*range(shared), *range(900, 900 + max(0, num_tokens - shared))][:num_tokens]
    )
    second_ids, num_hit = engine.prefill(second)
    assert num_hit == hit
    assert second.num_computed_tokens == num_tokens
    for g, layers in enumerate(LAYERS):
        reused = layers * hit // BLOCK
        assert second_ids[g][:reused] == first_ids[g][:reused], (
            "entry i * layers + j is block i of layer j"
        )
        if while_running:
            assert not set(second_ids[g][reused:]) & set(first_ids[g])
    assert engine.held(second) == engine.expected_held(second) and not engine.pages(second)


def test_a_prefix_grows_while_its_request_decodes():
    engine = Engine()
    first = text("first", 30)
    engine.prefill(first)
    for _ in range(40):
        engine.decode(first)
    again = make_request("again", [*range(30), *[7] * 40])
    assert engine.prefill(again)[1] == 64


def test_what_follows_a_found_prefix_is_cached_too():
    engine = Engine()
    engine.prefill(text("first", 50))
    assert engine.prefill(text("second", 100))[1] == 48
    assert engine.prefill(text("third", 150))[1] == 96


def test_chunks_of_a_prompt_are_cached_as_they_run():
    engine = Engine()
    chunked = text("chunked", 64)
    hits = []
    engine.prefill(chunked, num_tokens=20)
    hits.append(engine.manager.get_computed_blocks(text("longer", 90))[1])
    engine.manager.allocate_slots(chunked, 44)
    hits.append(engine.manager.get_computed_blocks(text("longer", 90))[1])
    assert hits == [16, 64]


def test_what_an_image_request_caches():
    """Its text in all stages, the rest of its prompt where nothing depends on the question."""
    engine = Engine()
    image = with_image("image")
    image_ids, _ = engine.prefill(image)
    for _ in range(100):
        engine.decode(image)
    whole, text_blocks = 90 // BLOCK, 32 // BLOCK
    # One entry for all layers of a group: of the first stage and of parked states behind the text.
    behind = (whole - text_blocks) * 2
    assert len(engine.pool.cached_block_hash_to_block) == text_blocks * len(LAYERS) + behind
    prefix = image.prompt_token_ids
    text_ids, num_hit = engine.prefill(make_request("text", [*prefix[:40], *range(900, 950)]))
    assert num_hit == 32
    for g, layers in enumerate(LAYERS):
        assert text_ids[g][: 2 * layers] == image_ids[g][: 2 * layers]
    placeholders = make_request("as text", prefix)
    assert engine.prefill(placeholders)[1] == 32, "its own text, not the picture"


@pytest.mark.parametrize(
    "group,layer", [(g, j) for g, layers in enumerate(LAYERS) for j in range(layers)]
)
@pytest.mark.parametrize("unit", [0, 1, 2])
def test_one_evicted_layer_ends_the_hit_there(group, layer, unit):
    engine = Engine()
    first = text("first", 64)
    ids, _ = engine.prefill(first)
    engine.finish(first)
    engine.pool.evict_blocks({ids[group][unit * LAYERS[group] + layer]})
    again = text("again", 64)
    again_ids, num_hit = engine.prefill(again)
    assert num_hit == unit * BLOCK
    for g, layers in enumerate(LAYERS):
        assert again_ids[g][: unit * layers] == ids[g][: unit * layers]
    assert engine.held(again) == engine.expected_held(again)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(
    "request_,chunk,step",
    [
        (text("r", 100), 16, 4096),
        (with_image("r"), None, 4096),
        (with_image("r"), 20, 64),  # a prompt longer than a step parks all it has
    ],
    ids=["text", "whole", "chunked"],
)
def test_a_short_pool_admits_nothing_and_takes_nothing(request_, chunk, step, caching):
    """Room for a request's first chunk is not enough: all of it must fit, pages included."""

    def fresh():
        return make_request("r", request_.prompt_token_ids, request_.mm_features, block_size=BLOCK)

    roomy = Engine(caching=caching)
    needed = sum(map(len, roomy.prefill(fresh())[0]))
    if request_.mm_features:
        whole = -(-90 // BLOCK) if chunk else caching * (90 // BLOCK)
        needed += PAGES * max(0, whole - 2)
    for num_blocks, fits in ((needed, False), (needed + 1, True)):  # one block is the null block
        engine = Engine(num_blocks=num_blocks, caching=caching, step=step)
        request = fresh()
        assert (engine.prefill(request, chunk) is not None) is fits
        taken = sum(engine.held(request)) + engine.pages(request) if fits else 0
        assert engine.pool.get_num_free_blocks() == num_blocks - 1 - taken


@pytest.mark.parametrize("while_running", [True, False])
def test_a_found_prefix_is_counted_once(while_running):
    """Blocks in use need no room; free ones leave the free queue and must not be promised twice."""
    engine = Engine(num_blocks=1 + 4 * DEPTH)
    first = text("first", 32)
    engine.prefill(first)
    if not while_running:
        engine.finish(first)
    assert engine.prefill(make_request("too long", [*range(32), *range(900, 933)])) is None
    _, num_hit = engine.prefill(make_request("fits", [*range(32), *range(900, 932)]))
    assert (num_hit, engine.pool.get_num_free_blocks()) == (32, 0)


@pytest.mark.parametrize("keep", [(0.5, 0.25), (1.0, 1.0)])
def test_vllm_s_own_coordinator_runs_the_groups(keep):
    schedule = RerouteOptions(layers=(3, 5), keep=keep).resolve(8)
    engine = Engine(schedule)
    coordinator = engine.manager.coordinator
    assert type(coordinator) is HybridKVCacheCoordinator
    kinds = [type(manager) for manager in coordinator.single_type_managers]
    assert kinds == [StageManager] * 3 + [ParkedManager]
    ids, _ = engine.prefill(text("first", 50))
    again_ids, num_hit = engine.prefill(text("again", 50))
    assert num_hit == 48
    for g, layers in enumerate(LAYERS):
        assert again_ids[g][: 3 * layers] == ids[g][: 3 * layers]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_any_traffic_keeps_the_books(seed, caching):
    """Arrivals in chunks, decodes, ends and preemptions: what is asked for is what is taken."""
    rng = random.Random(seed)
    engine = Engine(num_blocks=600, caching=caching, step=64)
    live, pictures = [], [f"picture-{i}" for i in range(3)]
    for step in range(200):
        choice = rng.random()
        if choice < 0.3:
            name, length = f"r{step}", rng.randint(1, 120)
            images = []
            if rng.random() < 0.6:
                images = [feature(rng.choice((0, 20, length)), 40, name=rng.choice(pictures))]
                length = max(length, images[0].mm_position.offset + 41)
            request = make_request(name, length, images, block_size=BLOCK)
            least = engine.hit(request) + 1
            if engine.prefill(request, rng.randint(least, max(least, length))) is None:
                del engine.requests[name]
            else:
                live.append(request)
        elif live and choice < 0.4:
            engine.finish(live.pop(rng.randrange(len(live))))
        elif live and choice < 0.45:
            request = live.pop(rng.randrange(len(live)))
            engine.preempt(request)
            if engine.prefill(request) is None:
                del engine.requests[request.request_id]
            else:
                live.append(request)
        elif live:
            request = rng.choice(live)
            left = request.num_tokens - request.num_computed_tokens
            free = engine.pool.get_num_free_blocks()
            new = engine.run(request, rng.randint(1, left)) if left else engine.decode(request)
            if new is None:
                assert engine.pool.get_num_free_blocks() == free
                engine.finish(request)
                live.remove(request)
        users = Counter()
        for request in live:
            assert engine.held(request) == engine.expected_held(request)
            assert engine.pages(request) == engine.expected_pages(request)
            for group in engine.manager.get_block_ids(request.request_id):
                users.update(group)
        users.pop(0, None)  # vLLM's null block fills tables where nothing is held
        assert engine.pool.get_num_free_blocks() == 599 - len(users)
        assert all(engine.pool.blocks[block].ref_cnt == count for block, count in users.items())
        if not caching:
            assert set(users.values()) <= {1}
    for request in live:
        engine.finish(request)
    assert engine.pool.get_num_free_blocks() == 599
