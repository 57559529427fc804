"""Where turns and requests have ended inside a block, so that the next turn of a conversation finds all of this one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from vllm.v1.request import Request


class OfferedEnds:
    """Token counts at which begun blocks were offered, by the hash of the whole blocks before.

    They only say which keys are worth a look: whether the blocks are still there, and hold the same
    tokens, the keys tell. So old ones may go, or stay too long.

    most: blocks behind which an end is remembered, the latest used.
    """

    def __init__(self, block_size: int, *, most: int) -> None:
        self.block_size, self.most = block_size, most
        self._ends: OrderedDict[Any, set[int]] = OrderedDict()

    def add(self, request: Request, num_tokens: int) -> None:
        """What the request's first `num_tokens` tokens have begun is offered."""
        blocks = num_tokens // self.block_size
        before = self._before(request, blocks)
        self._ends.setdefault(before, set()).add(num_tokens)
        self._ends.move_to_end(before)
        if len(self._ends) > self.most:
            self._ends.popitem(last=False)

    def between(self, request: Request, low: int, high: int) -> Iterator[int]:
        """Ends behind the request's own blocks, from the largest down: `low` < end <= `high`."""
        for blocks in range(high // self.block_size, low // self.block_size - 1, -1):
            before = self._before(request, blocks)
            ends = self._ends.get(before, ())
            if ends:
                self._ends.move_to_end(before)
            yield from sorted((end for end in ends if low < end <= high), reverse=True)

    def _before(self, request: Request, blocks: int) -> Any:
        return request.block_hashes[blocks - 1] if blocks else None
