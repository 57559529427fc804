"""What is found of conversations whose later turns bring tokens back: nothing without the states they come from."""

from dataclasses import replace

import pytest
from vllm.utils.math_utils import cdiv

from .kv_engine import BLOCK, PAGES, SCHEDULE, Engine, Picture, Text, ask

MARKER = Text("marker", 2)
RECALLS = replace(SCHEDULE, history="recall", marker=tuple(MARKER.tokens()))
SYSTEM, CAT, DOG = Text("system", 40), Picture("cat"), Picture("dog")
WHICH, WHERE = (Text("which", 20), MARKER), (Text("where", 20), MARKER)
SHORT = Text("short", 3)
FIRST = (SYSTEM, CAT, *WHICH)  # 102 tokens, its picture at [40, 80): blocks 2 to 4
SECOND = (*FIRST, SHORT, *WHERE)  # 127 tokens
BRIEF = (
    SYSTEM,
    Picture("bird", 44),
    Text("?", 3),
    MARKER,
)  # 89 tokens, its picture ends in block 5


def after(*conversations):
    """An engine that has answered these, and none of them is there any more."""
    engine = Engine(RECALLS)
    for number, parts in enumerate(conversations):
        request = ask(f"before {number}", *parts)
        engine.turns(request)
        engine.finish(request)
    return engine


def page_ids(engine, parts, block):
    """Of the states that a conversation's next turn would find, those of one block of tokens."""
    request = ask("looks", *parts)
    engine.requests["looks"] = request
    groups, _, _ = engine.manager.get_computed_blocks(request)
    del engine.requests["looks"]
    pages = groups.blocks[engine.parked.kv_cache_group_id]
    return {page.block_id for page in pages[block]} if block < len(pages) else set()


def test_a_turn_brings_back_a_quarter_until_the_cap_is_reached():
    engine = Engine(RECALLS)
    request = ask("asks", *SECOND, *(part for _ in range(6) for part in (SHORT, *WHERE)))
    engine.requests["asks"] = request
    turns = engine.live.of(request).turns.turns
    assert [turn.kept for turn in turns] == [(40, 20, 10)] + [(0, 5, 2)] * 4 + [(0, 0, 2)]
    assert [turn.end - turn.begin for turn in turns[1:]] == [2] * 5


@pytest.mark.parametrize(
    "before,prompt,hit",
    {
        "the next turn": ([FIRST], SECOND, 102),
        "the turn after": ([SECOND], (*SECOND, SHORT, *WHICH), 127),
        "another question of the second turn": ([SECOND], (*FIRST, SHORT, *WHICH), 102),
        "another picture": ([(*SECOND, DOG, *WHICH)], (*SECOND, CAT, *WHICH), 127),
        "behind another picture": (
            [(*SECOND, DOG, *WHICH)],
            (*SECOND, DOG, *WHICH, SHORT, *WHERE),
            189,
        ),
        "nothing to bring back yet": ([FIRST], (*FIRST, SHORT, DOG, *WHICH), 102),
    }.values(),
)
def test_hits(before, prompt, hit):
    engine = after(*before)
    request = ask("looks", *prompt)
    assert engine.hit(request) == hit
    engine.turns(request)
    assert engine.held(request) == engine.expected_held(request) and engine.pages(request) == 0


@pytest.mark.parametrize("block", [2, 3, 4])
def test_a_picture_whose_states_are_gone_runs_again(block):
    """Also where nothing else is missing; what is before the missing block serves as ever."""
    engine = after(FIRST)
    gone = page_ids(engine, SECOND, block)
    assert len(gone) == PAGES
    engine.pool.evict_blocks(gone)
    request = ask("asks", *SECOND)
    assert engine.hit(request) == block * BLOCK
    engine.turns(request)
    assert engine.hit(ask("asks again", *SECOND, SHORT, *WHICH)) == 127


def test_only_blocks_with_visual_tokens_are_needed():
    engine = after(FIRST)
    request = ask("asks", *SECOND)
    engine.requests["asks"] = request
    groups, _, _ = engine.manager.get_computed_blocks(request)
    pages = groups.blocks[engine.parked.kv_cache_group_id]
    assert [not page.is_null for page, _ in pages] == [False] * 2 + [True] * 3


def test_a_turn_that_asks_nothing_back_needs_no_states():
    """Its own picture is ranked alone, and no later turn of the prompt looks back."""
    engine = after(FIRST)
    for block in (2, 3, 4):
        engine.pool.evict_blocks(page_ids(engine, SECOND, block))
    assert engine.hit(ask("asks", *FIRST, SHORT, DOG, *WHICH)) == 102


def test_what_a_prompt_has_no_pages_of_it_does_not_offer():
    """A turn that nobody looks back at is found without its states: no blocks, or null blocks, are not them."""
    engine = after(FIRST)
    both = (*FIRST, SHORT, DOG, *WHICH)
    request = ask("asks", *both)
    engine.turns(request)
    engine.finish(request)
    assert engine.pool.null_block.block_hash is None
    for block in (2, 3, 4):
        engine.pool.evict_blocks(page_ids(engine, SECOND, block))
    assert engine.hit(ask("looks", *both, SHORT, *WHERE)) == 2 * BLOCK


def test_questions_beyond_the_cap_are_text():
    """Asked one by one: what decides nothing needs no states, and has none to offer."""
    engine, parts = Engine(RECALLS), list(FIRST)
    for number in range(8):
        request = ask(f"asks {number}", *parts)
        assert engine.hit(request) == (102 + 25 * (number - 1) if number else 0)
        engine.turns(request)
        assert engine.held(request) == engine.expected_held(request)
        engine.finish(request)
        parts += [SHORT, *WHERE]


def test_pages_stay_until_the_last_turn_that_looks_back_is_decided():
    engine = Engine(RECALLS)
    request = ask("asks", *SECOND, SHORT, DOG, *WHICH, SHORT, *WHERE)
    ends = [turn.end for turn in engine.live.of(request).turns.turns]
    engine.requests["asks"] = request
    held = []
    engine.prefill(request, ends[0], offers=True)
    held.append(engine.pages(request))
    for end in ends[1:]:
        engine.run(request, end - request.num_computed_tokens, offers=True)
        held.append(engine.pages(request))
    # The first turn fills blocks 2 to 5; the second picture is at [130, 170), its turn ends at 192.
    assert held == [4 * PAGES, 4 * PAGES, (4 + 4) * PAGES, 0]


def test_a_page_that_another_turn_goes_on_in_is_copied():
    """Others may find it as it is; what the later turn adds is its own."""
    engine = after(BRIEF)
    later = (*BRIEF, SHORT, CAT, *WHICH)  # its picture begins in block 5, too
    looks_back = (*later, SHORT, *WHERE)
    shared = page_ids(engine, (*BRIEF, SHORT, *WHERE), 5)
    assert len(shared) == PAGES
    request = ask("asks", *looks_back)
    assert engine.hit(request) == 89
    engine.turns(request)
    copies = {copy.src_block_id for copy in engine.manager.take_kv_cache_block_copies()[0]}
    assert shared <= copies
    both = page_ids(engine, (*looks_back, SHORT, *WHICH), 5)
    assert len(both) == PAGES and not both & shared
    assert page_ids(engine, (*BRIEF, SHORT, *WHERE), 5) == shared


def test_a_page_that_is_only_read_is_shared():
    engine = after(BRIEF)
    request = ask("asks", *BRIEF, SHORT, *WHERE)
    shared = page_ids(engine, (*BRIEF, SHORT, *WHERE), 5)
    engine.turns(request)
    copies = {copy.src_block_id for copy in engine.manager.take_kv_cache_block_copies()[0]}
    assert len(shared) == PAGES and not shared & copies


def test_both_histories_decide_apart():
    """What a turn of text leaves in a stage depends on the history; the first turn's states do not."""
    engine = after(SECOND)
    keeps = ask("keeps", *SECOND, SHORT, *WHICH)
    keeps.sampling_params.extra_args = {"reroute": {"history": "keep"}}
    assert engine.hit(keeps) == cdiv(102, BLOCK) * BLOCK - BLOCK
