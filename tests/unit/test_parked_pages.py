"""Pages of parked states: who holds them, from when to when."""

import pytest

from vllm_reroute.schedule import RerouteOptions

from .kv_engine import PAGES, Engine, Picture, Text, ask, text

SYSTEM, CAT, WHICH = Text("system", 40), Picture("cat"), Text("which", 20)
PROMPT = (SYSTEM, CAT, WHICH)  # 100 tokens; 32 are its text prefix


def held_after(engine, request, chunks):
    """Pages after each chunk."""
    held = []
    for chunk in chunks:
        if request.num_computed_tokens:
            engine.run(request, chunk)
        else:
            engine.prefill(request, chunk)
        assert engine.held(request) == engine.expected_held(request)
        held.append(engine.pages(request))
    return held


def test_a_whole_prompt_without_prefix_caching_takes_none():
    engine = Engine(caching=False)
    request = ask("r", *PROMPT)
    blocks = engine.pool.get_num_free_blocks()
    engine.prefill(request)
    assert engine.pool.get_num_free_blocks() == blocks - sum(engine.held(request))
    assert engine.manager.get_block_ids("r")[3] == []


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(
    "chunks,blocks",
    [
        ((30, 2, 1, 15, 1, 50, 1), (0, 0, 1, 1, 2, 5, 0)),
        ((100,), (0,)),
        ((99, 1), (5, 0)),
        ((33, 67), (1, 0)),
    ],
)
def test_pages_are_held_until_the_decisions(chunks, blocks, caching):
    engine = Engine(caching=caching)
    request = ask("r", *PROMPT)
    assert held_after(engine, request, chunks) == [PAGES * n for n in blocks]
    for _ in range(40):
        engine.decode(request)
        assert engine.pages(request) == 0


def test_a_text_request_never_holds_a_page():
    engine = Engine()
    request = text("r", 100)
    assert held_after(engine, request, (30, 30, 40)) == [0, 0, 0]


def test_released_pages_are_free_at_once_and_still_found():
    engine = Engine()
    request = ask("r", *PROMPT)
    engine.prefill(request)
    assert engine.pool.get_num_free_blocks() == 1999 - sum(engine.held(request))
    assert engine.hit(ask("again", *PROMPT)) == 96


def test_a_shared_page_stays_until_its_last_reader_has_decided():
    engine = Engine()
    first, second = ask("first", *PROMPT), ask("second", *PROMPT)
    engine.prefill(first, 96)
    engine.prefill(second, 97)
    pages = engine.parked.req_to_blocks["second"][PAGES * 2 : PAGES * 6]
    assert {page.ref_cnt for page in pages} == {2}
    engine.run(first, 4)
    assert {page.ref_cnt for page in pages} == {1} and engine.pages(first) == 0
    engine.run(second, 3)
    assert {page.ref_cnt for page in pages} == {0}


@pytest.mark.parametrize("caching,goes_on_at", [(True, 64), (False, 0)])
def test_preempted_in_the_middle_of_its_chunks(caching, goes_on_at):
    """It gives all back; with prefix caching it goes on behind the last whole block."""
    engine = Engine(caching=caching)
    request = ask("r", *PROMPT)
    held_after(engine, request, (30, 45))
    engine.preempt(request)
    assert engine.pool.get_num_free_blocks() == 1999
    assert not any(m.req_to_blocks for m in (*engine.stages, engine.parked))
    _, num_hit = engine.prefill(request, 80)
    assert num_hit == goes_on_at
    assert engine.pages(request) == PAGES * 3
    assert held_after(engine, request, (20,)) == [0]


@pytest.mark.parametrize("chunks", [(20,), (33,), (30, 45), (99,), (100,)])
@pytest.mark.parametrize("caching", [True, False])
def test_an_abort_gives_everything_back(chunks, caching):
    engine = Engine(caching=caching)
    request = ask("r", *PROMPT)
    held_after(engine, request, chunks)
    engine.finish(request)
    assert engine.pool.get_num_free_blocks() == 1999
    assert not any(m.req_to_blocks or m.num_cached_block for m in (*engine.stages, engine.parked))
    assert engine.manager.reset_prefix_cache()


def test_a_request_that_finds_parked_states_of_another_decides_with_its_own_blocks():
    """Whole prompt but the question from the cache: pages are shared until then, never written."""
    engine = Engine()
    engine.prefill(ask("first", *PROMPT))
    again = ask("again", SYSTEM, CAT, Text("where", 20))
    held = held_after(engine, again, (90, 10))
    assert held == [PAGES * 4, 0]


@pytest.mark.parametrize("step,blocks", [(4096, 0), (99, 5), (100, 0)])
def test_admission_counts_pages_a_prompt_will_need(step, blocks):
    """Without prefix caching only a prompt that is longer than a step is sure to need any."""
    engine = Engine(caching=False, step=step)
    request = ask("r", *PROMPT)
    engine.requests["r"] = request
    empty = engine.manager.empty_kv_cache_blocks.blocks
    asked = engine.parked.get_num_blocks_to_allocate(
        "r", 100, empty[3], 0, 0, 100, apply_admission_cap=True
    )
    assert asked == PAGES * blocks


def test_one_long_prompt_holds_its_pages_beside_a_step_only():
    """Encoder first: no dense stage, all that has run waits in pages and nowhere else."""
    schedule = RerouteOptions(schedule="nuwa").resolve(8)
    engine = Engine(schedule, caching=False, step=40)
    request = ask("r", CAT, WHICH)
    assert held_after(engine, request, (40, 19)) == [PAGES * 3, PAGES * 4]
    assert engine.held(request) == [0] * len(schedule.stages)
    assert held_after(engine, request, (1,)) == [0]


def test_the_table_is_indexed_by_prompt_position():
    """Pages of a token are at its own block's entries, whatever text ran before it."""
    engine = Engine(caching=False)
    request = ask("r", *PROMPT)
    engine.prefill(request, 60)
    table = engine.manager.get_block_ids("r")[3]
    assert len(table) == PAGES * 4 and table[: PAGES * 2] == [0] * PAGES * 2
    assert all(table[PAGES * 2 :])
