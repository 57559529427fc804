"""Parked states come back from their pages as they were, and a step's exchange says whose they are."""

from __future__ import annotations

import itertools
import random
from copy import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention

from vllm_reroute.attention.parked import PagePlaces, ParkedStates
from vllm_reroute.attention.step import RoutedStep
from vllm_reroute.kv_cache.spec import ParkedSpec
from vllm_reroute.schedule import RerouteOptions

from .steps import KINDS, plan_of, random_batch

HEADS, DIM = 2, 32
ROW = 2 * HEADS * DIM
NUM_BLOCKS, BLOCK = 30, 32
NAMES = itertools.count()
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def config(engine_config):
    return engine_config(dtype="float32", additional_config={"reroute": {"schedule": "pdrop"}})


def parked(config, width, dtype=F32, cache_dtype=F32):
    """As the decoder makes it, for a model of one type and a cache of another."""
    own = copy(config.cache_config)
    own.cache_dtype = "auto" if cache_dtype == F32 else str(cache_dtype).removeprefix("torch.")
    changed = SimpleNamespace(cache_config=own, model_config=SimpleNamespace(dtype=dtype))
    with set_current_vllm_config(config):
        layer = ParkedStates(decoder_layer(), f"layers.{next(NAMES)}.parked", width, changed)
    assert layer.kv_cache_torch_dtype == cache_dtype
    return layer


def decoder_layer():
    return Attention(4, DIM, 1.0, num_kv_heads=HEADS, prefix=f"layers.{next(NAMES)}.attn")


def places(num_pages, count, seed=0):
    """Tokens of a few requests: their blocks, one per page, are nobody else's."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(NUM_BLOCKS - 1, generator=generator) + 1
    tables = ids[: len(ids) // num_pages * num_pages].view(-1, num_pages)
    room = torch.randperm(len(tables) * BLOCK, generator=generator)[:count]
    return PagePlaces(tables[room // BLOCK].T.contiguous(), room % BLOCK)


def pools(dtype):
    yield "one piece", torch.randn(NUM_BLOCKS, HEADS, BLOCK, 2 * DIM).to(dtype)
    yield "tokens first", torch.randn(NUM_BLOCKS, BLOCK, HEADS, 2 * DIM).to(dtype).transpose(1, 2)
    yield "blocks apart", torch.randn(NUM_BLOCKS, 3, HEADS, BLOCK, 2 * DIM).to(dtype)[:, 1]


@pytest.mark.parametrize("width", [1, ROW - 1, ROW, ROW + 1, 2 * ROW, 3 * ROW - 5])
@pytest.mark.parametrize(
    "dtype,cache_dtype",
    [(F32, F32), (BF16, BF16), (F32, BF16), (F32, F16), (F16, BF16), (BF16, F32)],
)
def test_there_and_back(config, width, dtype, cache_dtype):
    layer = parked(config, width, dtype, cache_dtype)
    row = ROW * cache_dtype.itemsize // dtype.itemsize
    assert layer.num_pages == -(-width // row)
    for name, pool in pools(cache_dtype):
        layer.kv_cache = pool
        where = places(layer.num_pages, 60)
        before = pool.clone()
        states, others = torch.randn(60, width).to(dtype), torch.randn(9, width).to(dtype)
        layer.write(states, where)
        assert torch.equal(layer.read(where), states), name
        # Some of the tokens again, others beside them unchanged.
        some = torch.randperm(60)[:9]
        layer.write(others, PagePlaces(where.blocks[:, some], where.offsets[some]))
        states[some] = others
        order = torch.randperm(60)
        read = layer.read(PagePlaces(where.blocks[:, order], where.offsets[order]))
        assert torch.equal(read, states[order]), name
        untouched = sorted(set(range(NUM_BLOCKS)) - set(where.blocks.flatten().tolist()))
        assert untouched and torch.equal(pool[untouched], before[untouched]), name


def test_a_pool_around_it_is_left_alone(config):
    layer = parked(config, 2 * ROW)
    whole = torch.zeros(NUM_BLOCKS, 3, HEADS, BLOCK, 2 * DIM)
    layer.kv_cache = whole[:, 1]
    layer.write(torch.ones(50, 2 * ROW), places(2, 50))
    assert int(whole[:, 1].sum()) == 50 * 2 * ROW
    assert whole[:, 0].eq(0).all() and whole[:, 2].eq(0).all()


def test_its_pages_are_as_large_as_the_decoder_s(config):
    layer = parked(config, ROW + 1)
    spec = layer.get_kv_cache_spec(config)
    with set_current_vllm_config(config):
        of_decoder = decoder_layer().get_kv_cache_spec(config)
    assert isinstance(spec, ParkedSpec) and spec.num_layers == 2
    assert spec.page_size_bytes == of_decoder.page_size_bytes
    assert spec.block_size == of_decoder.block_size


@pytest.mark.parametrize("num_pages", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_an_exchange(config, num_pages, seed):
    """Every state goes to, and comes from, its own token's place in its own request's pages."""
    rng = random.Random(seed)
    schedule = RerouteOptions(layers=(1, 3), keep=(0.5, 0.1)).resolve(5)
    batch = random_batch(rng, schedule, KINDS[3:], block_size=4)
    plan = plan_of(batch, schedule, block_size=4)
    layer = parked(config, num_pages * ROW)
    builder_class = layer.attn_backend.get_builder_cls()
    spec = ParkedSpec(
        block_size=4, num_kv_heads=HEADS, head_size=DIM, dtype=F32, num_layers=num_pages
    )
    builder = builder_class(spec, [layer.layer_name], config, torch.device("cpu"))
    table = torch.randperm(len(batch) * 20 * num_pages).view(len(batch), -1).int()
    common = SimpleNamespace(block_table_tensor=table)
    positions = torch.arange(3)
    exchange = builder.build(0, common, step=RoutedStep(plan, positions))

    def pages(request, position):
        block = position // 4 * num_pages
        own = [int(table[request, block + page]) for page in range(num_pages)]
        return own, position % 4

    of_step = [(i, p) for i, r in enumerate(batch) for p in range(r.computed, r.end)]
    written = list(
        zip(exchange.written.blocks.T.tolist(), exchange.written.offsets.tolist(), strict=True)
    )
    assert written == [pages(*of_step[row]) for row in exchange.rows.tolist()]
    read = list(zip(exchange.read.blocks.T.tolist(), exchange.read.offsets.tolist(), strict=True))
    fetched = plan.boundary.fetched
    assert read == [pages(i, p) for i, p in zip(fetched.request, fetched.position, strict=True)]
    assert exchange.positions is positions
    assert exchange.source.tolist() == plan.boundary.source.tolist()

    tokens = of_step + list(zip(fetched.request.tolist(), fetched.position.tolist(), strict=True))
    candidates = [(i, p) for i, r in enumerate(batch) for p in r.candidates]
    assert [tokens[row] for row in exchange.source.tolist()] == candidates
    # What is read was parked by an earlier step, or came with a prefix-cache hit.
    for i, p in tokens[len(of_step) :]:
        assert batch[i].routing.text_prefix <= p < batch[i].computed


@pytest.mark.parametrize("offers", [True, False], ids=["prefix cache", "no prefix cache"])
def test_what_is_parked(offers):
    """What a later step reads, and with a prefix cache all that another prompt may begin with."""
    schedule = RerouteOptions(layers=(1, 3), keep=(0.5, 0.1)).resolve(5)
    for seed in range(20):
        batch = random_batch(random.Random(seed), schedule)
        boundary = plan_of(batch, schedule, offers_parked=offers).boundary
        expect = []
        for i, request in enumerate(batch):
            if request.routing is None:
                continue
            prefix, num_prompt = request.routing.text_prefix, request.routing.num_prompt
            last = request.end
            if request.end >= num_prompt:
                last = num_prompt // 4 * 4 if offers else 0
            expect += [(i, p) for p in range(max(request.computed, prefix), last)]
        found = []
        if boundary is not None:
            found = list(zip(*map(np.ndarray.tolist, vars(boundary.parked).values()), strict=True))
        assert found == expect


def test_steps_that_move_nothing(config):
    schedule = RerouteOptions(layers=(1, 3), keep=(0.5, 0.1)).resolve(5)
    plan = plan_of(random_batch(random.Random(0), schedule, ("text", "decode")), schedule)
    layer = parked(config, ROW)
    builder = layer.attn_backend.get_builder_cls()(
        layer.get_kv_cache_spec(config), [layer.layer_name], config, torch.device("cpu")
    )
    assert builder.build(0, SimpleNamespace(), step=RoutedStep(plan)) is None
    assert builder.build(0, SimpleNamespace(), step=RoutedStep(None)) is None
    assert builder.build_for_cudagraph_capture(SimpleNamespace()) is None
