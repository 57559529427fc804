"""Pages that hold parked states: a layer without queries, and what it does in a step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)
from vllm.v1.kv_cache_interface import KVCacheSpec, replace_as

from vllm_reroute.attention.step import RoutedStep, real_step
from vllm_reroute.kv_cache.spec import ParkedSpec
from vllm_reroute.plan.step_plan import Places
from vllm_reroute.resolved import dtype_of
from vllm_reroute.to_device import to_device


@dataclass(frozen=True)
class PagePlaces:
    """Where tokens' states are: block of each of a token's pages, and the offset in all of them.

    blocks: [pages, n] int64; offsets: [n] int64.
    """

    blocks: torch.Tensor
    offsets: torch.Tensor


@dataclass(frozen=True)
class ParkedExchange:
    """The states written to pages and read from them in a step.

    rows: [w] int64, of the step, written to `written`. read: earlier tokens. positions: [r] or
    [3, r] int64, rope positions of those read; None where none are. source: [candidates] int64,
    the row of each candidate among the step's tokens followed by those read; None where the
    candidates are the step's tokens.
    """

    rows: torch.Tensor
    written: PagePlaces
    read: PagePlaces
    positions: torch.Tensor | None
    source: torch.Tensor | None


class ParkedStates(Attention):
    """A pseudo layer whose K/V pages hold states at the first decision layer's input.

    It has the page size of the decoder's layers, so vLLM allocates, hashes, evicts and frees its
    pages like any others. A token's state of `width` values takes `num_pages` rows of K/V.
    """

    def __init__(self, like: Attention, name: str, width: int, vllm_config: VllmConfig) -> None:
        """like: a layer of the decoder, before or after routing. name: with one layer number."""
        super().__init__(
            like.num_heads,
            like.head_size,
            like.impl.scale,
            num_kv_heads=like.num_kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=name,
        )
        self.attn_backend = _parked_backend(self.attn_backend)
        self.width = width
        self.dtype = dtype_of(vllm_config)
        row_bytes = 2 * self.num_kv_heads * self.head_size * self.kv_cache_torch_dtype.itemsize
        self.num_pages = -(-width * self.dtype.itemsize // row_bytes)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        assert spec is not None
        return replace_as(spec, ParkedSpec, num_layers=self.num_pages)

    def write(self, states: torch.Tensor, places: PagePlaces) -> None:
        """Put states [n, width] into the pages of n tokens."""
        pages = self._pages()
        parts = states.split(pages.shape[-1], dim=1)
        for blocks, part in zip(places.blocks, parts, strict=True):
            pages[blocks, places.offsets, : part.shape[1]] = part

    def read(self, places: PagePlaces) -> torch.Tensor:
        """States [n, width] of n tokens."""
        pages = self._pages()
        rows = [pages[blocks, places.offsets] for blocks in places.blocks]
        return torch.cat(rows, dim=1)[:, : self.width]

    def _pages(self) -> torch.Tensor:
        """The pool as [blocks, block_size, values of a token], whatever the K/V layout inside."""
        cache = self.kv_cache
        num_blocks, heads, block_size, values = cache.shape
        row = heads * values
        span = 1 + sum(
            (n - 1) * s for n, s in zip(cache.shape[1:], cache.stride()[1:], strict=True)
        )
        assert span == block_size * row, "a K/V block is one piece of memory"
        pages = cache.as_strided((num_blocks, block_size, row), (cache.stride(0), row, 1))
        return pages if pages.dtype == self.dtype else pages.view(self.dtype)


@functools.lru_cache
def _parked_backend(underlying: type[AttentionBackend]) -> type[AttentionBackend]:
    return subclass_attention_backend_with_overrides(
        name_prefix="Parked",
        attention_backend_cls=underlying,
        overrides={"get_builder_cls": lambda: ParkedMetadataBuilder},
    )


class ParkedMetadataBuilder(AttentionMetadataBuilder[ParkedExchange | None]):
    """Turns a plan's places into places in pages."""

    _cudagraph_support = AttentionCGSupport.ALWAYS
    step: RoutedStep | None = None
    """Set by the V1 runner's hook; the V2 runner hands the step to `build`."""

    def __init__(
        self,
        kv_cache_spec: ParkedSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.num_pages, self.block_size = kv_cache_spec.num_layers, kv_cache_spec.block_size
        nowhere = torch.empty(self.num_pages + 1, 0, dtype=torch.int64, device=device)
        self._nowhere = PagePlaces(nowhere[:-1], nowhere[-1])

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        *,
        step: RoutedStep | None = None,
    ) -> ParkedExchange | None:
        """None in a step that neither writes nor reads."""
        step = real_step(step or self.step, common_attn_metadata)
        if step.plan is None or step.plan.boundary is None:
            return None
        boundary, table = step.plan.boundary, common_attn_metadata.block_table_tensor
        source = boundary.source
        return ParkedExchange(
            rows=to_device(boundary.parked_rows, self.device),
            written=self._places(boundary.parked, table),
            read=self._places(boundary.fetched, table),
            positions=step.fetched_positions,
            source=None if source is None else to_device(source, self.device),
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        return None

    def _places(self, places: Places, table: torch.Tensor) -> PagePlaces:
        """table: [requests, entries], the group's interleaved block table."""
        if not len(places):
            return self._nowhere
        block, offset = np.divmod(places.position, self.block_size)
        pages = np.arange(self.num_pages)[:, None]
        entries = places.request * table.shape[1] + block * self.num_pages + pages
        packed = to_device(np.concatenate((entries, offset[None])), self.device)
        return PagePlaces(table.reshape(-1)[packed[:-1]].long(), packed[-1])
