"""Pages of parked states: where prompt tokens wait between a step and the first decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_reroute.kv_cache import interleaving
from vllm_reroute.kv_cache.interleaving import LayerBlocks
from vllm_reroute.kv_cache.layered_manager import LayeredManager
from vllm_reroute.plan.request_routing import RequestRouting


class ParkedManager(LayeredManager):
    """An image prompt's tokens from its text prefix on, until its decisions have been taken.

    A table is as long as the prompt: entries before the text prefix are the null block. Pages go
    back to the pool right after the step that takes the decisions is scheduled; the prefix cache
    may still find them there. Where it is off, only pages that a later step reads are allocated:
    none for a prompt that runs in one step.
    """

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[LayerBlocks],
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """apply_admission_cap: vLLM asks for the whole request at once, to admit it or not."""
        computed = interleaving.flat(new_computed_blocks)
        first, end = self._entries(request_id, num_tokens, in_one_step=not apply_admission_cap)
        held = len(self.req_to_blocks.get(request_id, ())) + len(computed)
        return max(0, end - max(held, first)) + self._get_num_evictable_blocks(computed)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        first, end = self._entries(request_id, num_tokens)
        before = len(self.req_to_blocks.get(request_id, ()))
        if end <= max(first, before):
            return []
        held = self.req_to_blocks[request_id]
        held.extend([self._null_block] * (first - before))
        held.extend(self.block_pool.get_new_blocks(end - len(held)))
        return held[before:]

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Offer full pages for reuse."""
        routing = self.live.of(request)
        if routing is not None:
            self.offer(request, min(num_tokens, routing.num_prompt))

    @property
    def holders(self) -> list[str]:
        """Requests that hold pages."""
        return [request_id for request_id, blocks in self.req_to_blocks.items() if blocks]

    def num_held(self) -> int:
        """Pages that hold states, without the entries before the text prefixes."""
        return sum(self._num_held(request_id) for request_id in self.holders)

    def _num_held(self, request_id: str) -> int:
        routing = self.live.of_id(request_id)
        before = routing.text_prefix // self.block_size * self.num_layers
        return max(0, len(self.req_to_blocks[request_id]) - before)

    def release(self, request_id: str) -> None:
        """Every stage has the prompt: its parked states are only good for the prefix cache."""
        blocks = self.req_to_blocks.pop(request_id)
        self.block_pool.free_blocks(block for block in reversed(blocks) if not block.is_null)

    def pop_layer_blocks(self, request_id: str) -> list[LayerBlocks]:
        of_tokens = super().pop_layer_blocks(request_id)
        return [tuple(b for b in blocks if not b.is_null) for blocks in of_tokens]

    def _entries(
        self, request_id: str, num_tokens: int, in_one_step: bool = True
    ) -> tuple[int, int]:
        """Table entries [first, end) that hold pages once `num_tokens` tokens have run.

        in_one_step: whether all that is missing runs in one step; else the whole prompt may have
        to wait in pages.
        """
        routing = self.live.of_id(request_id)
        if routing is None:
            return 0, 0
        request = self.live.requests[request_id]
        if request.num_computed_tokens >= routing.num_prompt:
            return 0, 0
        first = routing.text_prefix // self.block_size
        end = self._num_pages(routing, num_tokens, in_one_step)
        return first * self.num_layers, end * self.num_layers

    def _num_pages(self, routing: RequestRouting, num_tokens: int, in_one_step: bool) -> int:
        if num_tokens < routing.num_prompt:
            return cdiv(num_tokens, self.block_size) if num_tokens > routing.text_prefix else 0
        if not in_one_step and routing.num_prompt > self.live.max_step_tokens:
            return cdiv(routing.num_prompt, self.block_size)
        return routing.num_prompt // self.block_size if self.live.offers_parked else 0
