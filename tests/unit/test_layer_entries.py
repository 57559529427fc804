"""One prefix-cache entry for the blocks of all layers that hold the same tokens."""

import pytest
from vllm.v1.core.block_pool import BlockPool

from vllm_reroute.kv_cache import layer_entries

LAYERS, GROUP = 3, 1
TOKENS, OTHERS = b"these tokens", b"other tokens"


@pytest.fixture
def pool():
    return BlockPool(num_gpu_blocks=20, enable_caching=True, hash_block_size=16)


def offered(pool, key=TOKENS, group=GROUP):
    blocks = tuple(pool.get_new_blocks(LAYERS))
    layer_entries.put(pool, key, group, blocks)
    return blocks


def found(pool, key=TOKENS, group=GROUP):
    return layer_entries.get(pool, key, group)


def reused(pool, block):
    """The pool gives a block to somebody else, who keeps it."""
    pool.free_blocks([block])
    taken = pool.get_new_blocks(pool.get_num_free_blocks())
    pool.free_blocks([other for other in taken if other is not block])


def test_all_layers_are_found_by_one_entry(pool):
    blocks = offered(pool)
    assert found(pool) == blocks and len(pool.cached_block_hash_to_block) == 1
    assert found(pool, OTHERS) is None and found(pool, group=2) is None
    layer_entries.put(pool, OTHERS, GROUP, blocks)
    assert found(pool, OTHERS) == found(pool) == blocks


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("key", [TOKENS, OTHERS])
def test_nothing_is_found_where_a_layer_is_gone(pool, layer, key):
    blocks = offered(pool)
    layer_entries.put(pool, OTHERS, GROUP, blocks)
    reused(pool, blocks[layer])
    assert found(pool, key) is None and len(pool.cached_block_hash_to_block) == 0


def test_a_layer_s_block_may_serve_another_layer_of_the_same_tokens(pool):
    """It then has the same key, and not what the first offer says of it."""
    first = offered(pool)
    reused(pool, first[1])
    rest = pool.get_new_blocks(LAYERS - 1)
    layer_entries.put(pool, TOKENS, GROUP, (rest[0], rest[1], first[1]))
    assert found(pool) == (rest[0], rest[1], first[1])


def test_of_two_offers_of_the_same_tokens_one_may_break(pool):
    first, second = offered(pool), offered(pool)
    assert found(pool) == first
    reused(pool, first[2])
    assert found(pool) == second


def test_nothing_is_found_after_a_reset(pool):
    blocks = offered(pool)
    pool.free_blocks(blocks)
    assert pool.reset_prefix_cache() and found(pool) is None
    assert found(pool, OTHERS) is None and offered(pool, OTHERS) == found(pool, OTHERS)
