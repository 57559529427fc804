"""Which visual tokens a stage holds, noted beside its K/V."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_reroute.attention.step_tables import StepTables
from vllm_reroute.plan.step_plan import Places, StageLengths
from vllm_reroute.routing.held_tokens import TEXT, HeldTokens

BLOCK, LAYERS = 4, (2, 3)


@pytest.fixture
def held():
    tables = StepTables(LAYERS)
    tables.allocate(
        block_size=BLOCK, max_reqs=2, max_tokens=8, max_blocks=3, device=torch.device("cpu")
    )
    # Request 0 has blocks 1, 2, 3 in a stage's first layer, request 1 has 4, 5, 6; stage 1: 7 and on.
    for layer, first in ((0, 1), (2, 7)):
        tables.block_tables[layer] = torch.arange(first, first + 6).view(2, 3)
    first_layer = SimpleNamespace(tables=tables, kv_cache=torch.zeros(20, 1))
    return HeldTokens([first_layer] * 2)


def write(held, stage, query_lens, seq_lens, numbers):
    """As a step that decides does. query_lens, seq_lens: of the stage, per request."""
    lengths = StageLengths(np.array(query_lens, np.int32), np.array(seq_lens, np.int32))
    request, position = (part.astype(np.int64) for part in lengths.request_and_position)
    tables = held._tables
    if len(request) <= tables.max_tokens:
        slots = tables.slots_of(stage, Places(request, position), layer=0)[0]
        tables.slots_in_step(stage, len(request)).copy_(slots)
    plan = SimpleNamespace(stages=[lengths] * 2)
    held.write(stage, plan, torch.tensor(numbers, dtype=torch.int32))


def among(held, stage, request, positions, first, shape):
    entries = Places(np.full(len(positions), request), np.array(positions, dtype=np.int64))
    return held.among(stage, entries, torch.full((len(positions),), first), shape).tolist()


def test_what_was_written_is_found_by_stage_and_request(held):
    write(held, 1, [3, 2], [5, 2], [TEXT, 4, 0, 1, TEXT])
    assert among(held, 1, 0, [2, 3, 4], 0, (1, 5)) == [[True, False, False, False, True]]
    # In a table of two prompts, whose second has its first visual token at place 7.
    assert among(held, 1, 1, [0, 1], 7, (2, 5)) == [[False] * 5, [False] * 3 + [True, False]]
    assert among(held, 0, 0, [2, 3, 4], 0, (1, 5)) == [[False] * 5], "another stage"


def test_rows_that_run_in_pieces_are_noted_too(held):
    """Then the step's tables of slots hold nothing of theirs."""
    write(held, 0, [9], [9], [TEXT] * 8 + [3])
    assert among(held, 0, 0, range(9), 0, (1, 4)) == [[False, False, False, True]]


def test_a_block_takes_them_along(held):
    write(held, 1, [2], [2], [1, 3])
    held.copy([(7, 12), (8, 13)])
    held._tables.block_tables[2, 0] = torch.tensor([12, 13, 9])
    assert among(held, 1, 0, [0, 1], 0, (1, 4)) == [[False, True, False, True]]


def test_text_overwrites_what_a_block_held_before(held):
    write(held, 0, [2], [2], [0, 1])
    write(held, 0, [2], [2], [TEXT, 2])
    assert among(held, 0, 0, [0, 1], 0, (1, 3)) == [[False, False, True]]
