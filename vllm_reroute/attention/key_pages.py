"""Keys of a layer, read back from its K/V pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_reroute.attention.layer import RoutedAttention

_DIGIT_VALUES = 128
"""Values of one digit: exact in every floating type K/V may have."""


def _anew(name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    return make()


@dataclass(frozen=True)
class KeyPlaces:
    """Where n tokens are in the pages of a layer.

    blocks: [n] int32. offsets: [n] int64, in these blocks.
    """

    blocks: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, layer: RoutedAttention, entries: torch.Tensor) -> KeyPlaces:
        """entries: [2, n] int64, as `StepTables.entries_of` gives them."""
        place = layer.place
        return cls(layer.tables.blocks_at(place.stage, entries, place.index)[0], entries[1])

    def split(self, first: int) -> tuple[KeyPlaces, KeyPlaces]:
        """The first ones, and the others."""
        blocks, offsets = self.blocks, self.offsets
        return KeyPlaces(blocks[:first], offsets[:first]), KeyPlaces(
            blocks[first:], offsets[first:]
        )


def read_keys(
    layer: RoutedAttention, at: KeyPlaces, once: Callable[..., torch.Tensor] = _anew
) -> torch.Tensor:
    """Keys [n, kv_heads, dim] of n tokens.

    once: `(name, make)`, a place to keep what is the same for all layers while the tokens are.
    """
    cache, where = layer.kv_cache, _key_places(layer)
    if where is None:
        return cache[at.blocks, :, at.offsets, : layer.head_size]
    elements = once(f"elements of {id(where)}", lambda: where[at.offsets])
    inside = cache.flatten(1) if cache.is_contiguous() else cache.reshape(len(cache), -1)
    return inside[at.blocks[:, None, None], elements]


def write_keys(layer: RoutedAttention, keys: torch.Tensor, at: KeyPlaces) -> None:
    """Put keys [n, kv_heads, dim] where the layer itself will write them later in the step.

    The values beside them are no values, but keys again: the layer overwrites both before it attends.
    """
    slots = torch.add(at.offsets, at.blocks, alpha=layer.tables.block_size)
    layer.impl.do_kv_cache_update(layer, keys, keys, layer.kv_cache, slots)


_FOUND: dict[tuple[object, ...], torch.Tensor | None] = {}
"""Layouts seen so far, by what they depend on."""


def _key_places(layer: RoutedAttention) -> torch.Tensor | None:
    """[block_size, kv_heads, dim] int64: where each element of K is among those of a block.

    None where K is simply the first half of a token's values, as on GPUs.
    """
    cache = layer.kv_cache
    layout = (
        type(layer.impl),
        cache.shape[1:],
        cache.dtype,
        cache.device,
        getattr(layer, "isa", None),
    )
    if layout not in _FOUND:
        _FOUND[layout] = _found_places(layer)
    return _FOUND[layout]


def _found_places(layer: RoutedAttention) -> torch.Tensor | None:
    """Found by letting the backend write known numbers into a block of its own, digit by digit."""
    shape, dtype = tuple(layer.kv_cache.shape[1:]), layer.kv_cache.dtype
    heads, size, values = shape
    dim = values // 2
    device = layer.kv_cache.device
    total = size * heads * dim
    numbers = torch.arange(1, total + 1, device=device)
    slots = torch.arange(size, 2 * size, device=device)
    found = torch.zeros(heads * size * values, dtype=torch.int64, device=device)
    scale = 1
    while scale <= total:
        scratch = torch.zeros(2, *shape, dtype=dtype, device=device)
        digits = (numbers // scale % _DIGIT_VALUES).view(size, heads, dim).to(dtype)
        layer.impl.do_kv_cache_update(layer, digits, torch.full_like(digits, -1), scratch, slots)
        found += scratch[1].flatten().clamp(min=0).long() * scale
        scale *= _DIGIT_VALUES
    order = found.sort(stable=True).indices[-total:]
    assert torch.equal(found[order], numbers), "the backend's K layout is not a permutation"
    where = order.view(size, heads, dim)
    plain = torch.arange(heads * size * values, device=device).view(heads, size, values)
    plain = plain[..., :dim].transpose(0, 1)
    return None if torch.equal(where, plain) else where
