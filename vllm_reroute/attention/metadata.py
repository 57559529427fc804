"""Attention metadata of one stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_reroute.attention.step_tables import StageViews
from vllm_reroute.plan.step_plan import StageLengths, StepPlan


@dataclass
class StageMetadata:
    """What the attention layers of one stage read.

    plan: the step's plan; None in a dummy run, where nothing is routed. shared: the backend's own
    metadata, None where nobody runs. views: block tables and slots, per layer. The next step of the same
    size may put its own plan and metadata here.
    pieces: the stage's rows in pieces, where they are more than a step may hold; the layers then
    read the metadata of the piece that runs. With each come its rows [n] among the stage's.
    """

    plan: StepPlan | None
    shared: Any
    views: StageViews | None
    pieces: tuple[tuple[torch.Tensor, StageMetadata], ...] = ()

    def of_layer(self, index: int) -> Any:
        """The backend's metadata, lent to layer `index` of the stage until the next one asks.

        Layers of a stage differ in nothing but their blocks and slots.
        """
        assert self.views is not None, "nobody attends where nobody runs"
        self.shared.block_table = self.views.block_tables[index]
        self.shared.slot_mapping = self.views.slot_mappings[index]
        return self.shared


def of_layers() -> dict[str, Any]:
    """The metadata of the step that runs, by layer; empty before there is a K/V pool."""
    metadata = get_forward_context().attn_metadata
    assert not isinstance(metadata, list), "micro-batches are refused at start"
    return metadata or {}


@contextmanager
def reading(metadata: StageMetadata, layer_names: tuple[str, ...]) -> Iterator[None]:
    """While entered, these layers read `metadata`."""
    context = get_forward_context()
    changed: dict[str, Any] = {**of_layers(), **dict.fromkeys(layer_names, metadata)}
    with override_forward_context(replace(context, attn_metadata=changed)):
        yield


def undivided_common(
    common: CommonAttentionMetadata, views: StageViews, seq_lens: np.ndarray
) -> CommonAttentionMetadata:
    """The runner's metadata, as a stage sees a step in which every stage runs the same tokens.

    seq_lens: [requests], of the batch without padding.
    """
    seen = placed_common(common, views)
    padding = len(views.seq_lens) - len(seq_lens)
    seen.seq_lens_cpu_upper_bound = _padded(seq_lens, padding, 0)
    seen.max_seq_len = int(seq_lens.max())
    return seen


def compact_common(
    common: CommonAttentionMetadata, views: StageViews, lengths: StageLengths
) -> CommonAttentionMetadata:
    """The runner's metadata, as a stage sees a step in which it runs rows of its own.

    lengths: of the batch without padding.
    """
    compact = placed_common(common, views)
    padding = len(views.seq_lens) - len(lengths.seq_lens)
    compact.num_reqs = len(views.seq_lens)
    compact.seq_lens_cpu_upper_bound = _padded(lengths.seq_lens, padding, 0)
    compact.query_start_loc_cpu = _padded(lengths.query_start_loc, padding, lengths.num_tokens)
    compact.num_actual_tokens = lengths.num_tokens
    compact.max_query_len = int(lengths.query_lens.max())
    compact.max_seq_len = int(lengths.seq_lens.max())
    return compact


def placed_common(common: CommonAttentionMetadata, views: StageViews) -> CommonAttentionMetadata:
    """A copy that reads a stage's tables, the first layer's blocks and slots among them."""
    # As `copy` does, but several times as fast.
    placed = object.__new__(type(common))
    vars(placed).update(vars(common))
    placed.seq_lens, placed.query_start_loc = views.seq_lens, views.query_start_loc
    placed.block_table_tensor = views.block_tables[0]
    placed.slot_mapping = views.slot_mappings[0]
    # Of the prompt, and worked out from lengths that the stage may not have.
    placed.positions = None
    placed._num_computed_tokens_cache = None
    placed._token_to_req_indices_cache = None
    return placed


def _padded(array: Any, padding: int, value: int) -> torch.Tensor:
    host = torch.from_numpy(array)
    return torch.nn.functional.pad(host, (0, padding), value=value) if padding else host
