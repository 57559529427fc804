"""What is found of conversations that keep their choice, and what is copied where a hit ends."""

from dataclasses import replace

import pytest

from vllm_reroute.kv_cache.offered_ends import OfferedEnds

from .kv_engine import PAGES, SCHEDULE, Engine, Picture, Text, ask

MARKER = Text("marker", 2)
KEEPS = replace(SCHEDULE, history="keep", marker=tuple(MARKER.tokens()))
SYSTEM, CAT, DOG = Text("system", 40), Picture("cat"), Picture("dog")
WHICH, WHERE = (Text("which", 20), MARKER), (Text("where", 20), MARKER)
SHORT, LONG = Text("short", 3), Text("long answer", 40)
FIRST = (SYSTEM, CAT, *WHICH)  # 102 tokens, its picture at [40, 80)

# What came before -> the prompt that is looked up, and its tokens that are found while that runs,
# and where they differ, once it has ended: then the block that it has begun is offered too.
TABLE = {
    "nothing": ([], FIRST, 0),
    # What does not depend on the question: stages before the first decision, and states parked there.
    "the same prompt": ([FIRST], FIRST, 96),
    "another question": ([FIRST], (SYSTEM, CAT, *WHERE), 80),
    "another question after more turns": ([(*FIRST, SHORT, *WHERE)], (SYSTEM, CAT, *WHERE), 80),
    "another first question of a conversation": (
        [FIRST],
        (SYSTEM, CAT, *WHERE, SHORT, DOG, *WHICH),
        80,
    ),
    # Nothing of a later turn with pictures but what is before it.
    "another question about a later picture": (
        [(*FIRST, SHORT, DOG, *WHERE)],
        (*FIRST, SHORT, DOG, *WHICH),
        102,
    ),
    # Alike up to the last whole block of its turn.
    "a question that ends otherwise": (
        [FIRST],
        (SYSTEM, CAT, Text("which", 16), Text("or", 4), MARKER, SHORT, *WHERE),
        96,
    ),
    "the next turn": ([FIRST], (*FIRST, SHORT, *WHERE), 102),
    "the turn after, short answers": (
        [FIRST, (*FIRST, SHORT, *WHERE)],
        (*FIRST, SHORT, *WHERE, SHORT, *WHICH),
        102 + 10,
        102 + 3 + 22,
    ),
    "a long answer": ([(*FIRST, LONG)], (*FIRST, LONG, *WHERE), 128, 142),
    "an answer cut short": ([(*FIRST, LONG)], (*FIRST, Text("long answer", 35), *WHERE), 126),
    "another answer": ([(*FIRST, SHORT, *WHERE)], (*FIRST, Text("brief", 3), *WHERE), 102),
    "two that ended behind the same block": (
        [(*FIRST, SHORT), (*FIRST, Text("short", 7)), (*FIRST, Text("shore", 5))],
        (*FIRST, Text("short", 7), *WHERE),
        102,
        109,
    ),
    "a picture right behind an answer": (
        [(*FIRST, LONG)],
        (*FIRST, LONG, DOG, *WHERE),
        128,
        142,
    ),
    "a picture where another answer ended": (
        [(*FIRST, SHORT)],
        (*FIRST, DOG, *WHERE),
        102,
    ),
    "a new picture": (
        [(*FIRST, SHORT, DOG, *WHERE)],
        (*FIRST, SHORT, DOG, *WHERE, SHORT, *WHICH),
        102 + 3 + 40 + 22,
    ),
    "another new picture": (
        [(*FIRST, SHORT, DOG, *WHERE)],
        (*FIRST, SHORT, CAT, *WHERE),
        102,
    ),
    "another picture before": ([(*FIRST, SHORT, *WHERE)], (SYSTEM, DOG, *WHICH, SHORT, *WHERE), 32),
    "two in a turn": (
        [(SYSTEM, CAT, SHORT, DOG, *WHICH)],
        (SYSTEM, CAT, SHORT, DOG, *WHICH, SHORT, *WHERE),
        40 + 40 + 3 + 40 + 22,
    ),
    "a salt": ([FIRST], (*FIRST, SHORT, *WHERE), 0),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("name", TABLE)
def test_hits(name, finished):
    before, prompt, *hits = TABLE[name]
    engine = Engine(KEEPS)
    for number, parts in enumerate(before):
        request = ask(f"before {number}", *parts)
        engine.turns(request)
        if finished:
            engine.finish(request)
    salt = {"cache_salt": "mine"} if name == "a salt" else {}
    assert engine.hit(ask("now", *prompt, **salt)) == hits[-1 if finished else 0]


@pytest.mark.parametrize(
    "prompt,offered",
    [
        (FIRST, 102),
        ((*FIRST, SHORT), 102),
        ((*FIRST, LONG), 128),
        ((*FIRST, SHORT, *WHERE), 112),
        ((*FIRST, SHORT, DOG, *WHERE), 102 + 3 + 40 + 22),
    ],
)
def test_what_is_offered_of_a_live_request(prompt, offered):
    engine = Engine(KEEPS)
    request = ask("first", *prompt)
    engine.turns(request)
    assert engine.manager.estimate_cached_tokens(request) == offered
    if offered < request.num_tokens:
        assert engine.hit(ask("longer", *prompt, *WHERE)) == offered


def test_an_end_is_remembered_for_as_many_blocks_as_there_are():
    ends = OfferedEnds(16, most=2)
    one, two, three = (ask(name, Text(name, 40)) for name in ("one", "two", "three"))
    for request in (one, two, three):
        ends.add(request, 35)
        ends.add(request, 38)
    assert [*ends.between(one, 0, 40)] == []
    assert [*ends.between(two, 0, 40)] == [*ends.between(three, 0, 40)] == [38, 35]
    assert [*ends.between(three, 35, 40)] == [*ends.between(three, 36, 39)] == [38]
    assert [*ends.between(three, 0, 37)] == [35]


def test_who_ends_inside_a_turn_leaves_no_part_of_it():
    engine = Engine(KEEPS)
    request = ask("first", *FIRST)
    engine.prefill(request, 90)
    engine.finish(request)
    assert [*engine.kept._ends.between(request, 0, 102)] == []
    request = ask("second", *FIRST)
    engine.turns(request)
    engine.finish(request)
    assert [*engine.kept._ends.between(request, 0, 102)] == [102]


def test_a_block_in_which_a_hit_ends_is_copied():
    """In every layer of every stage whose entries do not end with a block; nothing else is."""
    engine = Engine(KEEPS)
    first, later = ask("first", *FIRST), ask("later", *FIRST, SHORT, *WHERE)
    engine.turns(first)
    held = engine.manager.get_block_ids("first")
    ids, hit = engine.prefill(later)
    copies, kept = engine.manager.take_kv_cache_block_copies()
    assert hit == 102
    # 102, 82 and 72 entries at the turn's end: 6, 5 and 4 whole blocks, and a part of one more.
    expect = []
    for stage, whole in enumerate((6, 5, 4)):
        layers = KEEPS.stages[stage].num_layers
        assert ids[stage][: whole * layers] == held[stage][: whole * layers]
        for entry in range(whole * layers, (whole + 1) * layers):
            expect.append((held[stage][entry], ids[stage][entry]))
    assert [(c.src_block_id, c.dst_block_id) for c in copies] == expect
    engine.pool.free_blocks(kept)
    engine.finish(later)
    engine.finish(first)
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("block,hit", [(0, 0), (1, 16), (2, 96), (3, 96), (4, 96)])
def test_a_lost_block_costs_what_depends_on_it(stage, block, hit):
    """A part of what a turn has kept is worth nothing: then it is decided again, from parked states."""
    if stage == 0:
        hit = min(hit, 16 * block)
    engine = Engine(KEEPS)
    first, later = ask("first", *FIRST), ask("later", *FIRST, SHORT, *WHERE)
    engine.turns(first)
    layers = KEEPS.stages[stage].num_layers
    lost = engine.manager.get_block_ids("first")[stage][block * layers + layers - 1]
    engine.finish(first)
    engine.pool.evict_blocks({lost})
    assert engine.hit(later) == hit
    engine.turns(later)
    assert engine.hit(ask("again", *FIRST, SHORT, *WHERE, SHORT, *WHICH)) >= 102


def test_a_step_that_has_not_run_is_not_found():
    """Its blocks of the first stage would complete what others have left in later ones."""
    engine = Engine(KEEPS)
    first = ask("first", *FIRST)
    engine.turns(first)
    lost = engine.manager.get_block_ids("first")[0]
    engine.finish(first)
    engine.pool.evict_blocks({*lost})
    engine.prefill(ask("second", *FIRST, SHORT, *WHERE), 102)
    assert engine.hit(ask("third", *FIRST, SHORT, *WHERE)) == 32, "text, as in vLLM"


def test_what_is_kept_depends_on_how_much():
    """What no question has chosen serves every budget and both histories, a turn its own only."""
    engine = Engine(KEEPS)
    engine.turns(ask("first", *FIRST))
    for number, own in enumerate(({"keep": [0.5, 0.1]}, {"history": "rerank"})):
        request = ask(f"other {number}", *FIRST, SHORT, *WHERE)
        request.sampling_params.extra_args = {"reroute": own}
        assert engine.hit(request) == 96


def test_what_a_reranked_prompt_leaves_serves_the_first_turn():
    engine = Engine(KEEPS)
    first = ask("first", *FIRST)
    first.sampling_params.extra_args = {"reroute": {"history": "rerank"}}
    engine.prefill(first)
    engine.finish(first)
    assert engine.hit(ask("later", SYSTEM, CAT, *WHERE)) == 80


def test_a_hit_behind_the_first_turn_takes_none_of_its_pages():
    """They were never written, and would be offered to others."""
    engine = Engine(KEEPS)
    engine.turns(ask("first", *FIRST))
    later = ask("later", *FIRST, SHORT, DOG, *WHERE)
    engine.prefill(later, 120)
    assert later.num_computed_tokens == 120
    assert engine.pages(later) == engine.parked.num_held() == PAGES * 2
    blocks = engine.parked.req_to_blocks["later"]
    assert [block.is_null for block in blocks] == [True] * 6 * PAGES + [False] * 2 * PAGES


def test_a_request_that_wants_to_be_told_decides_all_its_turns():
    engine = Engine(KEEPS)
    engine.turns(ask("first", *FIRST))
    request = ask("later", *FIRST, SHORT, *WHERE)
    request.sampling_params.extra_args = {"reroute_explain": True}
    assert engine.hit(request) == 96


def test_answers_are_offered_as_they_grow():
    engine = Engine(KEEPS)
    request = ask("first", *FIRST)
    engine.turns(request)
    for _ in range(40):
        engine.decode(request)
        engine.kept.offer(request)
    # 142 tokens have run, 122 and 112 of them in later stages: 8, 7 and 7 blocks are whole.
    assert engine.hit(ask("later", *FIRST, output=[7] * 60)) == 128


def test_pages_are_for_turns_that_wait():
    """None for turns that run at once; those of a later turn come behind the entries of earlier ones."""
    engine = Engine(KEEPS)
    request = ask("first", *FIRST, SHORT, DOG, *WHERE)
    engine.prefill(request, 50)
    assert engine.pages(request) == PAGES * 2
    engine.run(request, 52)
    assert engine.pages(request) == 0
    assert len(engine.parked.req_to_blocks["first"]) == PAGES * 6
    engine.run(request, 20)
    assert engine.pages(request) == engine.parked.num_held() == PAGES * (8 - 6)
    assert len(engine.parked.req_to_blocks["first"]) == PAGES * 8
    engine.run(request, 45)
    assert engine.parked.holders == []
    assert engine.held(request) == engine.expected_held(request)


def test_a_page_that_two_turns_share_stays():
    """Tables only grow: what waits for the second question begins in the first one's last block."""
    engine = Engine(KEEPS)
    request = ask("first", *FIRST, SHORT, DOG, *WHERE)
    engine.prefill(request, 100)
    engine.run(request, 2)
    assert engine.pages(request) == engine.parked.num_held() == PAGES
    engine.run(request, 20)
    blocks = engine.parked.req_to_blocks["first"]
    assert [block.is_null for block in blocks] == [True] * 6 * PAGES + [False] * 2 * PAGES
    engine.run(request, 45)
    engine.finish(request)
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1
