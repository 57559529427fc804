"""The V1 runner's tables on CPU: the blocks that vLLM's own would hold, where layers read them."""

import random

import numpy as np
import pytest
import torch
from vllm.v1.worker.block_table import MultiGroupBlockTable, SlotMappingMode

from vllm_reroute.attention.step_tables import StepTables
from vllm_reroute.kv_cache import interleaving
from vllm_reroute.runners.v1_tables import DealtBlockTable, take_over

BLOCK, LAYERS, MAX_REQS, MAX_BLOCKS, PARKED = 4, (1, 5, 2), 6, 9, 2
CPU = torch.device("cpu")


def runner_tables():
    """Parked pages first, then the stages."""
    entries = [layers * MAX_BLOCKS for layers in (PARKED, *LAYERS)]
    return MultiGroupBlockTable(MAX_REQS, 64, False, CPU, [BLOCK] * 4, entries)


def own_tables():
    tables = StepTables(LAYERS)
    tables.allocate(
        block_size=BLOCK, max_reqs=MAX_REQS, max_tokens=64, max_blocks=MAX_BLOCKS, device=CPU
    )
    return tables


def random_change(rng, tables, held):
    """One thing the runner does, to all of these tables. held: blocks of each row."""
    row, other = rng.sample(range(MAX_REQS), 2)
    blocks = rng.randint(0, MAX_BLOCKS - held[row])
    new = tuple(rng.sample(range(1, 999), n * blocks) for n in (PARKED, *LAYERS))
    what = rng.choice(("append", "append", "add", "clear", "move", "swap"))
    for each in tables:
        if what == "append":
            each.append_row(new, row)
        elif what == "add":
            each.add_row(new, row)
        elif what == "clear":
            each.clear_row(row)
        elif what == "move":
            each.clear_row(other)
            each.move_row(row, other)
        else:
            each.swap_row(row, other)
        each.commit_block_table(MAX_REQS)
    before = held[row]
    held[row] = {"append": before + blocks, "add": blocks, "swap": held[other]}.get(what, 0)
    held[other] = {"move": before, "swap": before}.get(what, held[other])


@pytest.mark.parametrize("seed", range(8))
def test_layers_read_what_the_runner_has_put_there(seed):
    rng, own = random.Random(seed), own_tables()
    stock, taken, held = runner_tables(), runner_tables(), [0] * MAX_REQS
    for step in range(40):
        if step == 10:
            take_over(taken.block_tables, [1, 2, 3], own)
        random_change(rng, (stock, taken), held)
        if step < 10:
            continue
        for stage, layers in enumerate(LAYERS):
            expect = stock[stage + 1].get_numpy_array()
            for row, count in enumerate(held):
                dealt = interleaving.dealt(expect[row : row + 1], layers, count)[:, 0]
                assert np.array_equal(own.of_stage(stage)[:, row, :count].numpy(), dealt)
        parked = taken[0].get_device_tensor(MAX_REQS)
        for row, count in enumerate(held):
            assert torch.equal(
                parked[row, : count * PARKED], stock[0].block_table.cpu[row, : count * PARKED]
            )
    taken.clear()
    assert not own.block_tables.any()


def test_the_runner_works_out_no_slots_and_keeps_no_copy():
    own, tables = own_tables(), runner_tables()
    take_over(tables.block_tables, [1, 2, 3], own)
    assert {t.slot_mapping_mode for t in tables.block_tables} == {SlotMappingMode.NONE}
    tables.compute_slot_mapping(2, torch.tensor([0, 1, 2]), torch.tensor([5, 6]))
    for table in tables.block_tables:
        slots = table.slot_mapping.gpu[:6]  # what vLLM does with them in every step
        slots[2:6].fill_(-1)
        assert not isinstance(slots, torch.Tensor), "cutting a tensor takes longer than all of this"
    for stage, table in enumerate(tables.block_tables[1:]):
        read = own.of_stage(stage)
        given = table.get_device_tensor(2), table.block_table.cpu, table.block_table.gpu
        assert {tensor.data_ptr() for tensor in given} == {read.data_ptr()}
        assert torch.equal(given[0], read[0, :2])


def test_blocks_stay_the_runner_s_where_a_kernel_deals_them():
    own, tables = own_tables(), runner_tables()
    own.kernel = lambda *args, **kwargs: None
    take_over(tables.block_tables, [1, 2, 3], own)
    assert not any(isinstance(table, DealtBlockTable) for table in tables.block_tables)
    assert all(isinstance(table.slot_mapping.gpu, torch.Tensor) for table in tables.block_tables)
