"""What a group's attention kernels read, against a slow reference: blocks, slots, lengths, padding."""

import random

import numpy as np
import pytest
import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_reroute.attention.metadata import GroupBuffers, per_layer_metadata
from vllm_reroute.plan.step_plan import StageLengths

BLOCK = 4
LAYERS = 3
MAX_REQS, MAX_TOKENS, MAX_BLOCKS = 8, 64, 10
CPU = torch.device("cpu")


def group_buffers(num_layers=LAYERS):
    return GroupBuffers(
        num_layers=num_layers,
        block_size=BLOCK,
        max_reqs=MAX_REQS,
        max_tokens=MAX_TOKENS,
        max_blocks=MAX_BLOCKS,
        device=CPU,
    )


class Batch:
    """Requests of (tokens of the step, tokens run by this ratio, K/V held after the step)."""

    def __init__(self, rows, *, pad_reqs=0, pad_tokens=0, num_layers=LAYERS, seed=0):
        rng = random.Random(seed)
        self.rows, self.num_layers = rows, num_layers
        self.pad_reqs, self.pad_tokens = pad_reqs, pad_tokens
        width = MAX_BLOCKS * num_layers
        self.table = [[0] * width for _ in range(len(rows) + pad_reqs)]
        ids = rng.sample(range(1, 10000), width * len(rows))
        for i, (_, _, held) in enumerate(rows):
            used = cdiv(held, BLOCK) * num_layers
            self.table[i][:used] = ids[i * width : i * width + used]
        self.lengths = StageLengths(
            query_lens=np.array([query for _, query, _ in rows], dtype=np.int32),
            seq_lens=np.array([held for *_, held in rows], dtype=np.int32),
        )

    def common(self):
        """As a runner builds it: over all tokens of the step, padded."""
        starts = np.concatenate(([0], np.cumsum([tokens for tokens, *_ in self.rows])))
        starts = torch.from_numpy(np.pad(starts, (0, self.pad_reqs), mode="edge").astype(np.int32))
        seq_lens = [held + tokens - query for tokens, query, held in self.rows] + [
            0
        ] * self.pad_reqs
        num_tokens = int(starts[-1]) + self.pad_tokens
        return CommonAttentionMetadata(
            query_start_loc=starts.clone(),
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor(seq_lens, dtype=torch.int32),
            num_reqs=len(seq_lens),
            num_actual_tokens=num_tokens,
            max_query_len=max(tokens for tokens, *_ in self.rows),
            max_seq_len=max(seq_lens),
            block_table_tensor=torch.tensor(self.table, dtype=torch.int32),
            slot_mapping=torch.full((num_tokens,), 777),
            positions=torch.arange(num_tokens),
        )

    def block(self, request, index, layer):
        return self.table[request][index * self.num_layers + layer]

    def slots(self, layer):
        """Slot of every token that runs: the last ones of its request."""
        slots = []
        for i, (_, query, held) in enumerate(self.rows):
            for place in range(held - query, held):
                slots.append(self.block(i, place // BLOCK, layer) * BLOCK + place % BLOCK)
        return slots + [PAD_SLOT_ID] * self.pad_tokens


STEPS = {
    "decodes": [(1, 1, 5), (1, 1, 8), (1, 1, 9), (1, 1, 1)],
    "a routed image prompt": [(20, 9, 9)],
    "a text prompt": [(13, 13, 13)],
    "a text chunk": [(7, 7, 22)],
    "ends at a block's end": [(8, 8, 8), (4, 4, 16)],
    "one token kept": [(24, 1, 1)],
    "mixed": [(7, 7, 22), (20, 9, 9), (1, 1, 17), (13, 13, 13), (16, 4, 4)],
}


@pytest.mark.parametrize("num_layers", [1, 2, 5])
@pytest.mark.parametrize("pad_reqs,pad_tokens", [(0, 0), (2, 3), (0, 3)])
@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
def test_a_step(rows, pad_reqs, pad_tokens, num_layers):
    batch = Batch(rows, pad_reqs=pad_reqs, pad_tokens=pad_tokens, num_layers=num_layers)
    check(batch, group_buffers(num_layers))


def check(batch, buffers):
    common = batch.common()
    common.seq_lens += 3  # what earlier steps deferred
    common.compute_num_computed_tokens()  # another group's builder may have asked, and it is remembered
    compact = buffers.fill(common, batch.lengths)
    num_reqs = len(batch.rows)
    num_tokens = sum(query for _, query, _ in batch.rows)
    starts = [0, *np.cumsum([query for _, query, _ in batch.rows])]

    assert compact.num_reqs == num_reqs + batch.pad_reqs
    assert compact.num_actual_tokens == num_tokens + batch.pad_tokens
    assert compact.seq_lens.tolist() == [held for *_, held in batch.rows] + [0] * batch.pad_reqs
    assert compact.query_start_loc.tolist() == starts + [num_tokens] * batch.pad_reqs
    assert compact.query_start_loc_cpu.tolist() == compact.query_start_loc.tolist()
    assert compact.seq_lens_cpu_upper_bound.tolist() == compact.seq_lens.tolist()
    assert compact.max_query_len == max(query for _, query, _ in batch.rows)
    assert compact.max_seq_len == max(held for *_, held in batch.rows)
    assert compact.compute_num_computed_tokens()[:num_reqs].tolist() == [
        held - query for _, query, held in batch.rows
    ]

    for layer in range(batch.num_layers):
        table = buffers.block_tables[layer]
        for i, (*_, held) in enumerate(batch.rows):
            blocks = range(cdiv(held, BLOCK))
            assert table[i, : len(blocks)].tolist() == [batch.block(i, b, layer) for b in blocks]
        for i in range(num_reqs, compact.num_reqs):
            assert table[i, : cdiv(compact.max_seq_len, BLOCK)].eq(0).all(), (
                "padded rows have the null block"
            )
        assert buffers.slot_mappings[layer, : compact.num_actual_tokens].tolist() == batch.slots(
            layer
        )
    assert (
        compact.block_table_tensor.tolist() == buffers.block_tables[0, : compact.num_reqs].tolist()
    )
    assert compact.slot_mapping.tolist() == batch.slots(0)
    return compact


def test_no_two_layers_share_a_slot():
    batch, buffers = Batch(STEPS["mixed"]), group_buffers()
    buffers.fill(batch.common(), batch.lengths)
    slots = buffers.slot_mappings[:, : batch.lengths.num_tokens].flatten().tolist()
    assert len(set(slots)) == len(slots)


def random_rows(rng):
    rows = []
    for _ in range(rng.randint(1, MAX_REQS - 2)):
        query = rng.choice((1, 1, rng.randint(1, 8)))
        rows.append(
            (query + rng.choice((0, 0, 2)), query, rng.randint(query, MAX_BLOCKS * BLOCK - 2))
        )
    return rows


@pytest.mark.parametrize("seed", range(10))
def test_tensors_stay_where_they_are(seed):
    """Steps that grow and shrink: a CUDA graph replays with the addresses it was captured with."""
    rng = random.Random(seed)
    buffers = group_buffers()
    tensors = (
        buffers.block_tables,
        buffers.slot_mappings,
        buffers.seq_lens,
        buffers.query_start_loc,
    )

    def addresses(compact):
        layers = per_layer_metadata(compact_as_metadata(compact), buffers.views(1, 1))
        views = [
            compact.seq_lens,
            compact.query_start_loc,
            compact.block_table_tensor,
            compact.slot_mapping,
        ]
        views += [tensor for m in layers for tensor in (m.block_table, m.slot_mapping)]
        return [tensor.data_ptr() for tensor in (*tensors, *views)]

    seen = []
    for step in range(12):
        batch = Batch(
            random_rows(rng), pad_reqs=rng.randint(0, 2), pad_tokens=rng.randint(0, 3), seed=step
        )
        seen.append(addresses(check(batch, buffers)))
        dummy = buffers.fill(batch.common(), None)
        seen.append(addresses(dummy))
    assert seen == [seen[0]] * len(seen)
    assert [list(tensor.shape) for tensor in tensors] == [
        [LAYERS, MAX_REQS, MAX_BLOCKS],
        [LAYERS, MAX_TOKENS],
        [MAX_REQS],
        [MAX_REQS + 1],
    ]


class Metadata:
    """Stands for what any backend builds: a shared part, and the two fields that differ by layer."""

    def __init__(self, seq_lens, block_table, slot_mapping):
        self.seq_lens, self.block_table, self.slot_mapping = seq_lens, block_table, slot_mapping


def compact_as_metadata(compact):
    return Metadata(compact.seq_lens, compact.block_table_tensor, compact.slot_mapping)


def test_layers_share_all_but_their_blocks_and_slots():
    batch, buffers = Batch(STEPS["mixed"]), group_buffers()
    shared = compact_as_metadata(buffers.fill(batch.common(), batch.lengths))
    layers = per_layer_metadata(shared, buffers.views(5, batch.lengths.num_tokens))
    assert len(layers) == LAYERS
    for layer, metadata in enumerate(layers):
        assert type(metadata) is Metadata and metadata.seq_lens is shared.seq_lens
        assert metadata.slot_mapping.tolist() == batch.slots(layer)
        assert metadata.block_table[2, :5].tolist() == [batch.block(2, b, layer) for b in range(5)]


def test_a_dummy_run_is_dense():
    batch, buffers = Batch([(6, 2, 2), (1, 1, 9)], pad_tokens=2), group_buffers()
    common = batch.common()
    dense = buffers.fill(common, None)
    assert (dense.num_actual_tokens, dense.max_seq_len) == (
        common.num_actual_tokens,
        common.max_seq_len,
    )
    assert dense.seq_lens.tolist() == [6, 9]
    assert dense.query_start_loc.tolist() == [0, 6, 7]
    assert dense.slot_mapping[7:].tolist() == [PAD_SLOT_ID] * 2


def test_a_full_table_fits():
    rows = [(1, 1, MAX_BLOCKS * BLOCK)] * MAX_REQS
    check(Batch(rows), group_buffers())


def test_padding_behind_a_full_table_fits():
    rows = [(1, 1, 3), (1, 1, MAX_BLOCKS * BLOCK)]
    check(Batch(rows, pad_tokens=6), group_buffers())
