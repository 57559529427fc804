"""Prefix-cache entries of blocks that hold the same tokens, one for all layers of a group."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id

from vllm_reroute.kv_cache.interleaving import LayerBlocks

_BLOCKS: WeakKeyDictionary[BlockPool, dict[int, LayerBlocks]] = WeakKeyDictionary()
"""Of each pool: by the id of a first layer's block, that block and those of the other layers."""


def put(pool: BlockPool, key: BlockHash, group_id: int, blocks: LayerBlocks) -> None:
    """Offer the blocks of a group's layers under one more key.

    Only the first layer's is in the pool's own map. All of them carry the very same key object while
    they hold what was offered, since the pool takes it off a block that it gives to somebody else.
    """
    first: KVCacheBlock = blocks[0]
    entry = make_block_hash_with_group_id(key, group_id)
    if first.block_hash is not None:
        pool._insert_block_hash(entry, first, num_tokens=None)
        return
    for block in blocks:
        block.set_block_hash(entry)
    _BLOCKS.setdefault(pool, {})[first.block_id] = blocks
    pool.cached_block_hash_to_block.insert(entry, first)


def get(pool: BlockPool, key: BlockHash, group_id: int) -> LayerBlocks | None:
    """The blocks of all layers, None where one is missing."""
    entry = make_block_hash_with_group_id(key, group_id)
    while (first := pool.cached_block_hash_to_block.get_one_block(entry)) is not None:
        blocks, own = _BLOCKS[pool][first.block_id], first.block_hash
        if all(block.block_hash is own for block in blocks):
            return blocks
        # The pool has reused another layer's block: this one is of no use any more.
        pool.evict_blocks({first.block_id})
    return None


class LayersAtOnce:
    """Stands in for a pool where vLLM looks up prefixes block by block: finds groups of layers."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.hash_block_size = pool.hash_block_size

    def get_cached_block(self, key: BlockHash, group_ids: list[int]) -> list[LayerBlocks] | None:
        """Blocks of all layers of each group; None where one is missing in any."""
        found = []
        for group_id in group_ids:
            blocks = get(self._pool, key, group_id)
            if blocks is None:
                return None
            found.append(blocks)
        return found
