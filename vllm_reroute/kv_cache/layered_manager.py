"""Block accounting of a group whose layers share one block table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from vllm_reroute.kv_cache import interleaving, layer_entries
from vllm_reroute.kv_cache.interleaving import LayerBlocks
from vllm_reroute.kv_cache.live_routing import LiveRouting
from vllm_reroute.kv_cache.spec import LayeredSpec


class LayeredManager(FullAttentionManager):
    """What stage groups and parked pages have in common.

    Cached prefixes are passed around as lists of `LayerBlocks`, one entry per `block_size` tokens,
    as the coordinator expects (vLLM annotates them as single blocks); a request's own blocks are
    table entries.
    """

    supports_fine_grained_hash_lookup = False

    live: LiveRouting
    """Set by the scheduler once it exists."""

    def __init__(self, kv_cache_spec: LayeredSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.num_layers = kv_cache_spec.num_layers
        self._to_copy: dict[str, int] = {}
        """Requests that go on in a block others share, by id: its number."""

    def add_local_computed_blocks(  # type: ignore[override]  # LayerBlocks
        self, request_id: str, new_computed_blocks: Sequence[LayerBlocks], *args: Any
    ) -> None:
        super().add_local_computed_blocks(request_id, interleaving.flat(new_computed_blocks), *args)
        self.num_cached_block[request_id] = len(new_computed_blocks)

    def _copy_shared(self, request_id: str) -> None:
        """Give the request a copy of the shared block it goes on in, made before its first step runs."""
        if request_id not in self._to_copy:
            return
        first = self._to_copy.pop(request_id) * self.num_layers
        copies = self.block_pool.get_new_blocks(self.num_layers)
        for entry, copy in enumerate(copies, first):
            shared = self.req_to_blocks[request_id][entry]
            self._apply_cow(request_id, entry, shared, copy)

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Always 0: cascade attention would need equal slots in every request."""
        return 0

    def put(self, request_id: str, index: int, key: Any) -> None:
        """Offer the request's blocks of `block_size` tokens number `index` under one more key."""
        first = index * self.num_layers
        blocks = tuple(self.req_to_blocks[request_id][first : first + self.num_layers])
        assert not blocks[0].is_null, "nobody finds what is nowhere"
        layer_entries.put(self.block_pool, key, self.kv_cache_group_id, blocks)

    def offer(self, request: Request, num_tokens: int) -> None:
        """Offer the full blocks of the request's first `num_tokens` tokens for reuse."""
        request_id = request.request_id
        blocks = self.req_to_blocks.get(request_id) or []
        cached = self.num_cached_block.get(request_id, 0)
        full = min(num_tokens // self.block_size, len(blocks) // self.num_layers)
        if cached >= full:
            return
        for index in range(cached, full):
            if not blocks[index * self.num_layers].is_null:
                self.put(request_id, index, request.block_hashes[index])
        self.num_cached_block[request_id] = full

    def withdraw(self, request: Request) -> None:
        """Take back what was offered for tokens that have not run and now will not."""
        ran = request.num_computed_tokens // self.block_size
        offered = self.num_cached_block.get(request.request_id, 0)
        if offered > ran:
            blocks = self.req_to_blocks[request.request_id]
            unwritten = blocks[ran * self.num_layers : offered * self.num_layers]
            self.block_pool.evict_blocks({block.block_id for block in unwritten})

    @classmethod
    def find_longest_cache_hit(  # type: ignore[override]  # LayerBlocks
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: KVCacheSpec,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[LayerBlocks], ...], int]:
        """Longest prefix cached in every layer of the group, as `LayerBlocks` per group."""
        lookup: Any = layer_entries.LayersAtOnce(block_pool)
        found, length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, lookup, kv_cache_spec, *args, **kwargs
        )
        by_group: Any = found
        return by_group, length

    def cached_blocks(self, block_hash: Any) -> LayerBlocks | None:
        """The blocks of all layers that hold the tokens of `block_hash`, None if one is missing."""
        return layer_entries.get(self.block_pool, block_hash, self.kv_cache_group_id)
