"""Blocks of live requests, counted in vLLM's own pool, managers and coordinator."""

import random
from collections import Counter

import pytest
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, UnitaryKVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager

from vllm_reroute.kv_cache.manager import RoutedAttentionManager
from vllm_reroute.plan.routed_length import routed_length
from vllm_reroute.plan.visual_spans import visual_spans
from vllm_reroute.schedule import RerouteOptions
from vllm_reroute.schedule.footprint import RequestFootprint
from vllm_reroute.schedule.published import ACTIONS, SCHEDULES, TIERS

from .parts import feature, kv_cache_config, make_request

BLOCK = 16
# 8 layers: 3 dense, then 2 and 3 with half and a quarter of the visual tokens. Three groups.
SCHEDULE = RerouteOptions(layers=(3, 5), keep=(0.5, 0.25)).resolve(8)
DEPTH = SCHEDULE.num_layers
IMAGE = feature(40, 40)  # keeps 40, 20 and 10
IMAGE_PROMPT = 90


class Engine:
    """What the scheduler does with a `KVCacheManager`, one request at a time."""

    def __init__(self, schedule=SCHEDULE, num_blocks=2000, caching=True):
        config = kv_cache_config(schedule, num_blocks, block_size=BLOCK)
        self.manager = KVCacheManager(
            config,
            max_model_len=4096,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
            enable_caching=caching,
        )
        self.pool = self.manager.block_pool
        self.groups = self.manager.coordinator.single_type_managers
        self.requests = {}
        for group in self.groups:
            group.requests = self.requests

    def prefill(self, request, num_tokens=None):
        """Block ids per group, and tokens found in the prefix cache; None if it does not fit."""
        self.requests[request.request_id] = request
        request.skip_reading_prefix_cache = visual_spans(request) is not None
        hits, num_hit, _ = self.manager.get_computed_blocks(request)
        new = (num_tokens or request.num_tokens) - num_hit
        if (
            self.manager.allocate_slots(request, new, num_hit, hits, full_sequence_must_fit=True)
            is None
        ):
            return None
        request.num_computed_tokens = num_hit + new
        return self.manager.get_block_ids(request.request_id), num_hit

    def decode(self, request):
        """New block ids per group for one more token."""
        request.append_output_token_ids(7)
        new = self.manager.allocate_slots(request, 1)
        request.num_computed_tokens += 1
        return new.get_block_ids()

    def finish(self, request):
        self.manager.free(request)
        del self.requests[request.request_id]

    def held(self, request):
        return [len(ids) for ids in self.manager.get_block_ids(request.request_id)]


def text(name, num_tokens, first=0):
    return make_request(name, list(range(first, first + num_tokens)), block_size=BLOCK)


def with_image(name, num_tokens=IMAGE_PROMPT, image=IMAGE):
    return make_request(name, num_tokens, [image], block_size=BLOCK)


def expected_held(schedule, request):
    spans = visual_spans(request)
    return [
        len(schedule.layers_with(ratio))
        * cdiv(routed_length(request.num_computed_tokens, spans, ratio), BLOCK)
        for ratio in schedule.ratios
    ]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_text,num_visual", [(104, 576), (8, 576), (33, 1152), (20, 1)])
def test_a_live_request_holds_its_footprint(name, action, tier, num_text, num_visual):
    schedule = RerouteOptions(schedule=name, action=action, tier=tier).resolve(32)
    engine = Engine(schedule, num_blocks=5000)
    request = with_image("r", num_text + num_visual, feature(5, num_visual))
    ids, _ = engine.prefill(request)
    footprint = RequestFootprint(
        schedule=schedule,
        num_visual=num_visual,
        num_text=num_text,
        bytes_per_token=1,
        block_size=BLOCK,
    )
    assert sum(map(len, ids)) == footprint.routed_blocks
    assert engine.pool.get_num_free_blocks() == 4999 - footprint.routed_blocks


def test_every_layer_has_blocks_of_its_own():
    engine = Engine()
    requests = [with_image("a"), text("b", 70, first=500), with_image("c")]
    ids = [block for request in requests for group in engine.prefill(request)[0] for block in group]
    assert len(ids) == len(set(ids)) and 0 not in ids, "0 is vLLM's null block"


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(
    "request_", [text("r", 30), with_image("r"), with_image("r", 88, feature(0, 64))]
)
def test_decode_takes_a_block_per_layer_at_a_boundary_and_none_elsewhere(request_, caching):
    request = make_request("r", request_.num_prompt_tokens, request_.mm_features, block_size=BLOCK)
    engine = Engine(caching=caching)
    engine.prefill(request)
    spans = visual_spans(request)
    grew = Counter()
    for _ in range(40):
        before, num_tokens = engine.held(request), request.num_computed_tokens
        new = engine.decode(request)
        for g, ratio in enumerate(SCHEDULE.ratios):
            crosses = routed_length(num_tokens, spans, ratio) % BLOCK == 0
            layers = len(SCHEDULE.layers_with(ratio))
            assert len(new[g]) == (layers if crosses else 0)
            assert engine.held(request)[g] == before[g] + len(new[g])
            grew[ratio] += crosses
    assert all(2 <= grew[ratio] <= 3 for ratio in SCHEDULE.ratios)


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
    assert all(not group.req_to_blocks and not group.num_cached_block for group in engine.groups)
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
    for g, ratio in enumerate(SCHEDULE.ratios):
        reused = len(SCHEDULE.layers_with(ratio)) * hit // BLOCK
        assert second_ids[g][:reused] == first_ids[g][:reused], (
            "entry i * layers + j is block i of layer j"
        )
        if while_running:
            assert not set(second_ids[g][reused:]) & set(first_ids[g])
    assert engine.held(second) == expected_held(SCHEDULE, second)


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


def test_an_image_request_caches_the_text_before_its_image_only():
    engine = Engine()
    image = with_image("image")
    image_ids, _ = engine.prefill(image)
    for _ in range(100):
        engine.decode(image)
    assert len(engine.pool.cached_block_hash_to_block) == 2 * DEPTH
    prefix = image.prompt_token_ids
    text_ids, num_hit = engine.prefill(make_request("text", [*prefix[:40], *range(900, 950)]))
    assert num_hit == 32
    for g, ratio in enumerate(SCHEDULE.ratios):
        reused = 2 * len(SCHEDULE.layers_with(ratio))
        assert text_ids[g][:reused] == image_ids[g][:reused]
    placeholders = make_request("as text", prefix)
    assert engine.prefill(placeholders)[1] == 32


def test_an_image_at_the_start_caches_nothing():
    engine = Engine()
    engine.prefill(with_image("image", image=feature(3, 40)))
    assert len(engine.pool.cached_block_hash_to_block) == 0


def test_an_image_request_never_reads_the_cache():
    engine = Engine()
    first, second = with_image("first"), with_image("second")
    engine.prefill(first)
    engine.finish(first)
    cached = {block.block_id for block in engine.pool.blocks if block.block_hash is not None}
    assert len(cached) == 2 * DEPTH
    ids, num_hit = engine.prefill(second)
    assert num_hit == 0
    assert engine.held(second) == expected_held(SCHEDULE, second)
    assert not cached & {block for group in ids for block in group}


@pytest.mark.parametrize(
    "group,layer", [(g, j) for g, r in enumerate(SCHEDULE.ratios) for j in range(2)]
)
@pytest.mark.parametrize("unit", [0, 1, 2])
def test_one_evicted_layer_ends_the_hit_there(group, layer, unit):
    engine = Engine()
    first = text("first", 64)
    ids, _ = engine.prefill(first)
    engine.finish(first)
    layers = len(SCHEDULE.layers_with(SCHEDULE.ratios[group]))
    engine.pool.evict_blocks({ids[group][unit * layers + layer]})
    again = text("again", 64)
    again_ids, num_hit = engine.prefill(again)
    assert num_hit == unit * BLOCK
    for g, ratio in enumerate(SCHEDULE.ratios):
        reused = unit * len(SCHEDULE.layers_with(ratio))
        assert again_ids[g][:reused] == ids[g][:reused]
    assert engine.held(again) == expected_held(SCHEDULE, again)


@pytest.mark.parametrize("request_", [text("r", 100), with_image("r")])
def test_a_short_pool_admits_nothing_and_takes_nothing(request_):
    def fresh():
        return make_request("r", request_.prompt_token_ids, request_.mm_features, block_size=BLOCK)

    roomy = Engine()
    needed = sum(map(len, roomy.prefill(fresh())[0]))
    for num_blocks, fits in ((needed, False), (needed + 1, True)):  # one block is the null block
        engine = Engine(num_blocks=num_blocks)
        chunk = None if visual_spans(request_) else 16
        assert (engine.prefill(fresh(), chunk) is not None) is fits, (
            "the first chunk alone would fit"
        )
        assert engine.pool.get_num_free_blocks() == (
            num_blocks - 1 if not fits else 0 if chunk is None else needed - 8
        )


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


@pytest.mark.parametrize(
    "keep,kind", [((0.5, 0.25), HybridKVCacheCoordinator), ((1.0, 1.0), UnitaryKVCacheCoordinator)]
)
def test_vllm_s_own_coordinator_runs_the_groups(keep, kind):
    schedule = RerouteOptions(layers=(3, 5), keep=keep).resolve(8)
    engine = Engine(schedule)
    assert type(engine.manager.coordinator) is kind
    assert [type(group) for group in engine.groups] == [RoutedAttentionManager] * len(
        schedule.ratios
    )
    ids, _ = engine.prefill(text("first", 50))
    again_ids, num_hit = engine.prefill(text("again", 50))
    assert num_hit == 48
    for g, ratio in enumerate(schedule.ratios):
        reused = 3 * len(schedule.layers_with(ratio))
        assert again_ids[g][:reused] == ids[g][:reused]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_any_traffic_keeps_the_books(seed, caching):
    rng = random.Random(seed)
    engine = Engine(num_blocks=600, caching=caching)
    live = []
    for step in range(150):
        choice = rng.random()
        if choice < 0.35:
            name, length = f"r{step}", rng.randint(1, 120)
            image = (
                feature(rng.randint(0, length), rng.randint(1, 60)) if rng.random() < 0.5 else None
            )
            num_tokens = length + (image.mm_position.length + 1 if image else 0)
            request = make_request(name, num_tokens, [image] if image else [], block_size=BLOCK)
            if engine.prefill(request) is None:
                del engine.requests[name]
            else:
                live.append(request)
        elif live and choice < 0.5:
            engine.finish(live.pop(rng.randrange(len(live))))
        elif live and engine.pool.get_num_free_blocks() >= DEPTH:
            engine.decode(rng.choice(live))
        users = Counter()
        for request in live:
            assert engine.held(request) == expected_held(SCHEDULE, request)
            for group in engine.manager.get_block_ids(request.request_id):
                users.update(group)
        assert engine.pool.get_num_free_blocks() == 599 - len(users)
        assert all(engine.pool.blocks[block].ref_cnt == count for block, count in users.items())
        if not caching:
            assert set(users.values()) <= {1}
    for request in live:
        engine.finish(request)
    assert engine.pool.get_num_free_blocks() == 599
