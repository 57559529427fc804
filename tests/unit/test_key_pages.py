"""Keys read back from a layer's pages are those its backend has written there, bit by bit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa

from vllm_reroute.attention import key_pages
from vllm_reroute.attention.key_pages import KeyPlaces, read_keys, write_keys
from vllm_reroute.attention.step_tables import StepTables
from vllm_reroute.plan.step_plan import Places

NUM_BLOCKS, MAX_BLOCKS = 40, 4
REQUESTS = 3
LAYERS = (2, 3)
"""Of two stages; the tests look at layer 1 of the second one."""


class PlainImpl:
    """Writes as GPU backends do: a token's K, then its V."""

    def do_kv_cache_update(self, layer, key, value, kv_cache, slots):
        size, dim = kv_cache.shape[2], kv_cache.shape[3] // 2
        kv_cache[slots // size, :, slots % size, :dim] = key
        kv_cache[slots // size, :, slots % size, dim:] = value


def cpu_impl():
    impl = CPUAttentionBackendImpl.__new__(CPUAttentionBackendImpl)
    impl.attn_type, impl.kv_cache_dtype = AttentionType.DECODER, "auto"
    return impl


class Layer(SimpleNamespace):
    """What a routed layer is to `key_pages`, with tables of its own."""

    def __init__(self, impl, cache, isa=None):
        size, dim = cache.shape[2], cache.shape[3] // 2
        tables = StepTables(LAYERS)
        tables.allocate(
            block_size=size, max_reqs=5, max_tokens=9, max_blocks=MAX_BLOCKS, device=cache.device
        )
        blocks = torch.randperm(NUM_BLOCKS - 1)[: REQUESTS * MAX_BLOCKS] + 1
        tables.block_tables[3, :REQUESTS] = blocks.view(REQUESTS, MAX_BLOCKS).int()
        super().__init__(
            impl=impl,
            kv_cache=cache,
            tables=tables,
            place=SimpleNamespace(stage=1, index=1),
            head_size=dim,
            isa=isa,
            _k_scale_float=1.0,
            _v_scale_float=1.0,
        )

    def slots(self, places):
        size = self.kv_cache.shape[2]
        table = self.tables.block_tables[3]
        return torch.tensor(
            [
                int(table[request, place // size]) * size + place % size
                for request, place in zip(*places, strict=True)
            ]
        )


def everywhere(size):
    """(requests, places) of all tokens the tables have room for."""
    request, place = np.divmod(np.arange(REQUESTS * MAX_BLOCKS * size), MAX_BLOCKS * size)
    return request, place


def at(layer, request, place):
    return KeyPlaces.of(layer, layer.tables.entries_of(Places(request, place)))


def values(count, heads, dim, dtype):
    return torch.randn(count, heads, dim).to(dtype), torch.randn(count, heads, dim).to(dtype)


def check(layer):
    """Written by the backend, some read back in any order; then others written by `write_keys`."""
    _, heads, size, _ = layer.kv_cache.shape
    dim, dtype = layer.head_size, layer.kv_cache.dtype
    request, place = everywhere(size)
    keys, others = values(len(request), heads, dim, dtype)
    layer.impl.do_kv_cache_update(
        layer, keys, others, layer.kv_cache, layer.slots((request, place))
    )
    some = np.random.default_rng(0).permutation(len(request))[:50]
    assert torch.equal(read_keys(layer, at(layer, request[some], place[some])), keys[some])

    new, _ = values(len(some), heads, dim, dtype)
    written, others = at(layer, np.append(request[some], 0), np.append(place[some], 0)).split(50)
    assert len(others.blocks) == len(others.offsets) == 1
    write_keys(layer, new, written)
    keys[some] = new
    assert torch.equal(read_keys(layer, at(layer, request, place)), keys)
    assert read_keys(layer, at(layer, request[:0], place[:0])).shape == (0, heads, dim)


@pytest.fixture(autouse=True)
def _no_layout_known(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(key_pages, "_FOUND", {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
@pytest.mark.parametrize("heads,size", [(1, 32), (2, 32), (3, 64), (2, 16), (8, 32)])
def test_cpu(dtype, dim, heads, size):
    cache = torch.randn(NUM_BLOCKS, heads, size, 2 * dim).to(dtype)
    layer = Layer(cpu_impl(), cache, _get_attn_isa(dtype, size, dim, "auto"))
    check(layer)
    assert key_pages._key_places(layer) is not None, "the CPU's layout is not plain"


def test_layouts_are_told_apart():
    """Same shape and type, another instruction set: its layout is looked at on its own."""
    shape = (NUM_BLOCKS, 2, 32, 128)
    for isa in ("vec", "vec16"):
        check(Layer(cpu_impl(), torch.randn(shape), isa))
    check(Layer(PlainImpl(), torch.randn(shape)))
    assert len(key_pages._FOUND) == 3


def test_a_layout_is_looked_for_once(monkeypatch):
    layer = Layer(cpu_impl(), torch.randn(NUM_BLOCKS, 2, 32, 64), "vec")
    check(layer)
    monkeypatch.setattr(key_pages, "_found_places", None)
    check(layer)


@pytest.mark.parametrize("permuted", [False, True], ids=["heads first", "tokens first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_layouts(dtype, permuted):
    """As on GPUs, where memory may have tokens before heads."""
    cache = torch.randn(NUM_BLOCKS, 2, 32, 256).to(dtype)
    if permuted:
        cache = torch.randn(NUM_BLOCKS, 32, 2, 256).to(dtype).transpose(1, 2)
    layer = Layer(PlainImpl(), cache)
    check(layer)
    assert key_pages._key_places(layer) is None


@pytest.mark.parametrize("impl", ["plain", "cpu"])
def test_blocks_apart(impl):
    """A cache whose blocks lie further apart than they are long, as in a pool packed with others."""
    cache = torch.randn(NUM_BLOCKS, 2, 2, 32, 128)[:, 1]
    assert not cache.is_contiguous()
    if impl == "plain":
        check(Layer(PlainImpl(), cache))
    else:
        check(Layer(cpu_impl(), cache, "vec"))


def test_what_is_no_permutation_is_noticed():
    class Rounding(PlainImpl):
        def do_kv_cache_update(self, layer, key, value, kv_cache, slots):
            super().do_kv_cache_update(layer, key / 2, value, kv_cache, slots)

    layer = Layer(Rounding(), torch.zeros(NUM_BLOCKS, 2, 32, 128))
    with pytest.raises(AssertionError, match="not a permutation"):
        read_keys(layer, at(layer, *everywhere(32)))
