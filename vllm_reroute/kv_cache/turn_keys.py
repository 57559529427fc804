"""Prefix-cache keys of an image request's blocks, where they hold what turns have kept."""

from __future__ import annotations

from typing import Any

from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import BlockHash, generate_block_hash_extra_keys
from vllm.v1.request import Request

from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.turns import Turn


class TurnKeys:
    """A block's key stands for all tokens that its content depends on.

    Those of text before the first picture, and of stages before the first decision, are vLLM's own.
    Behind it a block of a later stage depends on all tokens up to the end of every turn it touches,
    the question included, and on how much is kept.
    """

    def __init__(self, request: Request, routing: RequestRouting, block_size: int) -> None:
        self.request, self.routing, self.block_size = request, routing, block_size
        self._chains: dict[int, BlockHash] = {}

    def needed(self, stage: int, index: int) -> int:
        """Tokens that block `index` of a stage depends on."""
        length = (index + 1) * self.block_size
        if stage < self.routing.dense_stages:
            return length
        return self.routing.turns.needed(stage, length)

    def full(self, stage: int, index: int) -> BlockHash | None:
        """Key of block `index` of a stage; None while the request lacks tokens it depends on."""
        needed = self.needed(stage, index)
        if needed > self.request.num_tokens:
            return None
        if stage < self.routing.dense_stages or needed <= self.routing.text_prefix:
            return self.request.block_hashes[index]
        return self._key("full", needed, index)

    def filled_up_to(self, num_tokens: int, index: int) -> BlockHash:
        """Key of block `index` of any stage, of which only what `num_tokens` tokens fill is meant."""
        return self._key("part", num_tokens, index)

    def _key(self, kind: str, num_tokens: int, index: int) -> BlockHash:
        routing = self.routing
        how = routing.keep, routing.recalls, kind, index
        return BlockHash(sha256((self._chain(num_tokens), *how)))

    def page(self, turn: Turn, index: int) -> BlockHash:
        """Key of a page of parked states that holds visual tokens of a turn, and of earlier ones.

        One that the turn fills is like any other page with the same tokens.
        """
        first, size = index * self.block_size, self.block_size
        if turn.begin <= first and first + size <= turn.end:
            return self.request.block_hashes[index]
        return BlockHash(sha256((self._chain(turn.end), "page", index)))

    def _chain(self, num_tokens: int) -> BlockHash:
        """Hash of exactly the first `num_tokens` tokens, pictures and salt included."""
        if num_tokens not in self._chains:
            request = self.request
            blocks = num_tokens // self.block_size
            begin = blocks * self.block_size
            parent: Any = request.block_hashes[blocks - 1] if blocks else None
            extra, _ = generate_block_hash_extra_keys(request, begin, num_tokens, 0)
            tokens = tuple(request.all_token_ids[begin:num_tokens])
            self._chains[num_tokens] = BlockHash(sha256((parent, tokens, extra)))
        return self._chains[num_tokens]
