"""Which tokens of an image prompt are found in the prefix cache, and what is missing without them."""

import pytest

from vllm_reroute.kv_cache.interleaving import flat
from vllm_reroute.schedule import RerouteOptions

from .kv_engine import BLOCK, PAGES, SCHEDULE, Engine, Picture, Text, ask
from .parts import make_request

SYSTEM = Text("system", 40)
CAT, DOG = Picture("cat"), Picture("dog")
WHICH, WHERE = Text("which", 20), Text("where", 20)
ANSWER = Text("answer", 12)
FIRST = (SYSTEM, CAT, WHICH)  # 100 tokens; 32 are its text prefix
LAYERS = [stage.num_layers for stage in SCHEDULE.stages]

# What came before -> the prompt that is looked up, and its tokens that are found.
TABLE = {
    "nothing": ([], FIRST, 0),
    "the same prompt": ([FIRST], FIRST, 96),
    "another question": ([FIRST], (SYSTEM, CAT, WHERE), 80),
    "the same question, longer": ([FIRST], (SYSTEM, CAT, WHICH, WHERE), 96),
    "the next turn": ([FIRST], (*FIRST, ANSWER, WHERE), 96),
    "two turns later": (
        [FIRST, (*FIRST, ANSWER, WHERE)],
        (*FIRST, ANSWER, WHERE, ANSWER, WHICH),
        128,
    ),
    "another picture": ([FIRST], (SYSTEM, DOG, WHICH), 32),
    "the picture in other words": ([FIRST], (WHERE, CAT, WHICH), 0),
    "a picture after it": ([FIRST], (SYSTEM, CAT, DOG, WHICH), 80),
    "after it, seen before": (
        [FIRST, (SYSTEM, CAT, DOG, WHICH)],
        (SYSTEM, CAT, DOG, WHERE),
        112,
    ),
    "before it": ([FIRST], (SYSTEM, DOG, CAT, WHICH), 32),
    "both, now only the first": ([(SYSTEM, CAT, DOG, WHICH)], FIRST, 80),
    "a text that begins alike": ([(SYSTEM, Text("poem", 100))], FIRST, 32),
    "a text shorter than the prefix": ([(Text("system", 20),)], FIRST, 16),
    "a picture at the start": ([(CAT, WHICH)], (CAT, WHERE), 32),
    "a picture in the first block": (
        [(Text("hi", 5), CAT, WHICH)],
        (Text("hi", 5), CAT, WHERE),
        32,
    ),
    "a picture at a block's edge": (
        [(Text("edge", 32), CAT, WHICH)],
        (Text("edge", 32), CAT, WHERE),
        64,
    ),
    "other text in the picture's block": (
        [FIRST],
        (Text("system", 36), Text("else", 4), CAT, WHICH),
        32,
    ),
    "a picture of another size": ([FIRST], (SYSTEM, Picture("cat", 41), WHICH), 80),
    "a video of that name": ([FIRST], (SYSTEM, Picture("film", modality="video"), WHICH), 32),
    "the same video": (
        [(SYSTEM, Picture("film", modality="video"), WHICH)],
        (SYSTEM, Picture("film", modality="video"), WHERE),
        80,
    ),
    "a prompt of whole blocks": ([(SYSTEM, CAT, Text("q", 16))], (SYSTEM, CAT, Text("q", 16)), 80),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("before,prompt,hit", TABLE.values(), ids=TABLE)
def test_hits(before, prompt, hit, finished):
    """The same whether those who came before still run or are gone."""
    engine = Engine()
    for number, parts in enumerate(before):
        request = ask(f"before {number}", *parts)
        engine.prefill(request)
        if finished:
            engine.finish(request)
    assert engine.hit(ask("now", *prompt)) == hit


@pytest.mark.parametrize(
    "prompt,ran,offered",
    [
        ((Text("poem", 100),), 100, 96),
        ((Text("poem", 100),), 50, 48),
        (FIRST, 100, 96),
        (FIRST, 70, 64),
        # The first block holds a part of the picture: it is offered in the stages before decisions only.
        ((Text("hi", 8), CAT, WHICH), 68, 64),
        ((SYSTEM, CAT, Text("q", 16)), 96, 96),
    ],
)
def test_what_is_offered_of_a_live_request(prompt, ran, offered):
    """The same as the very same prompt finds, but for the last tokens, which it always runs itself."""
    for caching in (True, False):
        engine = Engine(caching=caching)
        request = ask("first", *prompt)
        engine.prefill(request, ran)
        assert engine.manager.estimate_cached_tokens(request) == (offered if caching else 0)
        if caching and offered < request.num_tokens:
            assert engine.hit(ask("again", *prompt)) == offered


def test_what_was_found_counts_as_offered():
    engine = Engine()
    engine.prefill(ask("first", *FIRST))
    again = ask("again", SYSTEM, CAT, WHERE)
    assert engine.prefill(again, 90)[1] == 80
    assert engine.manager.estimate_cached_tokens(again) == 80


@pytest.mark.parametrize("hit,prompt", [(32, (SYSTEM, DOG, WHICH)), (80, (SYSTEM, CAT, WHERE))])
def test_a_hit_holds_what_is_needed_to_go_on(hit, prompt):
    """Text in every stage; behind it the stages before the decision, and the parked states."""
    engine = Engine()
    first = ask("first", *FIRST)
    engine.prefill(first, 99)
    first_ids = engine.manager.get_block_ids("first")
    blocks, num_hit, _ = engine.manager.get_computed_blocks(
        engine.requests.setdefault("now", ask("now", *prompt))
    )
    assert num_hit == hit
    ids = [[block.block_id for block in flat(group)] for group in blocks.blocks]
    for stage, layers in enumerate(LAYERS):
        tokens = hit if stage == 0 else 32
        assert ids[stage] == first_ids[stage][: layers * tokens // BLOCK]
    behind = [0] * PAGES * 2 + first_ids[3][PAGES * 2 : PAGES * hit // BLOCK]
    assert ids[3] == (behind if hit > 32 else [])


def test_who_finds_a_prefix_shares_its_blocks():
    engine = Engine()
    first, again = ask("first", *FIRST), ask("again", SYSTEM, CAT, WHERE)
    engine.prefill(first, 99)
    first_ids = engine.manager.get_block_ids("first")
    ids, num_hit = engine.prefill(again, 99)
    assert num_hit == 80
    assert (
        ids[0][: 3 * 5] == first_ids[0][: 3 * 5]
        and ids[3][: PAGES * 5] == first_ids[3][: PAGES * 5]
    )
    assert not set(ids[0][3 * 5 :]) & set(first_ids[0]), "what it runs itself is its own"
    engine.run(again, 1)
    assert engine.held(again) == engine.expected_held(again) and not engine.pages(again)
    engine.finish(first)
    engine.finish(again)
    assert engine.pool.get_num_free_blocks() == 1999


@pytest.mark.parametrize("behind,hit", [(18, 96), (17, 80)])
def test_a_hit_may_cover_all_but_the_last_tokens(behind, hit):
    """The step that runs them takes the decisions, from 96 parked tokens and them. One is too few."""
    engine = Engine()
    prompt = (SYSTEM, CAT, Text("q", behind))
    engine.prefill(ask("first", *prompt))
    again = ask("again", *prompt)
    assert engine.prefill(again, 80 + behind)[1] == hit
    assert engine.held(again) == engine.expected_held(again)


@pytest.mark.parametrize("generated", [0, 1, 30])
def test_who_is_resumed_finds_no_more_than_its_prompt_but_one(generated):
    """Its generated tokens run after the prompt's last one, which must run again."""
    engine = Engine()
    prompt = (SYSTEM, CAT, Text("q", 16))  # 96 tokens: six whole blocks
    request = ask("r", *prompt)
    engine.prefill(request)
    for _ in range(generated):
        engine.decode(request)
    engine.preempt(request)
    assert request.num_tokens == 96 + generated
    _, num_hit = engine.prefill(request)
    assert num_hit == 80
    assert engine.held(request) == engine.expected_held(request)


@pytest.mark.parametrize("schedule", [SCHEDULE, RerouteOptions(schedule="nuwa").resolve(8)])
def test_generated_tokens_are_never_found_behind_a_picture(schedule):
    """Nobody parks them: also where a resumed request's last page has room for them."""
    engine = Engine(schedule)
    request = ask("r", *FIRST)
    engine.prefill(request)
    for _ in range(30):
        engine.decode(request)
    engine.preempt(request)
    engine.manager.reset_prefix_cache()
    engine.prefill(request, 99)
    engine.run(request, 31)
    engine.decode(request)
    answered = make_request("next turn", [*request.all_token_ids, 7, 7], request.mm_features)
    assert engine.hit(answered) == 96


def test_chunks_are_found_as_they_run():
    engine = Engine()
    first = ask("first", *FIRST)
    found = []
    for chunk in (20, 20, 30, 29, 1):
        if first.num_computed_tokens:
            engine.run(first, chunk)
        else:
            engine.prefill(first, chunk)
        found.append(engine.hit(ask("now", *FIRST)))
    assert found == [16, 32, 64, 96, 96]


@pytest.mark.parametrize("block", range(2, 6))
@pytest.mark.parametrize("page", range(PAGES))
def test_a_lost_page_ends_the_hit_there(block, page):
    engine = Engine()
    first = ask("first", *FIRST)
    engine.prefill(first, 99)
    pages = engine.manager.get_block_ids("first")[3]
    engine.run(first, 1)
    engine.finish(first)
    engine.pool.evict_blocks({pages[block * PAGES + page]})
    again = ask("again", *FIRST)
    assert engine.prefill(again)[1] == block * BLOCK
    assert engine.held(again) == engine.expected_held(again)


@pytest.mark.parametrize("block", range(6))
@pytest.mark.parametrize("layer", range(3))
def test_a_lost_block_of_the_dense_stage_ends_the_hit_there(block, layer):
    engine = Engine()
    first = ask("first", *FIRST)
    ids, _ = engine.prefill(first)
    engine.finish(first)
    engine.pool.evict_blocks({ids[0][block * 3 + layer]})
    assert engine.prefill(ask("again", *FIRST))[1] == block * BLOCK


@pytest.mark.parametrize("block,hit", [(0, 0), (1, 16), (2, 96)])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_lost_block_of_a_later_stage_costs_text_only(stage, block, hit):
    """Behind the text prefix later stages are not reused at all."""
    engine = Engine()
    first = ask("first", *FIRST)
    ids, _ = engine.prefill(first)
    engine.finish(first)
    engine.pool.evict_blocks({ids[stage][block * LAYERS[stage] + 1]})
    assert engine.prefill(ask("again", *FIRST))[1] == hit


def test_a_lost_page_is_made_again():
    """An evicted part costs time once; the next one finds it."""
    engine = Engine()
    first = ask("first", *FIRST)
    engine.prefill(first, 99)
    pages = engine.manager.get_block_ids("first")[3]
    engine.run(first, 1)
    engine.finish(first)
    engine.pool.evict_blocks({pages[3 * PAGES]})
    assert engine.prefill(ask("again", *FIRST))[1] == 48
    assert engine.hit(ask("third", *FIRST)) == 96


def test_a_salt_separates():
    engine = Engine()
    engine.prefill(ask("mine", *FIRST, cache_salt="mine"))
    assert engine.hit(ask("yours", *FIRST, cache_salt="yours")) == 0
    assert engine.hit(ask("nobody's", *FIRST)) == 0
    assert engine.hit(ask("mine again", *FIRST, cache_salt="mine")) == 96


def test_who_must_not_read_finds_nothing():
    engine = Engine()
    engine.prefill(ask("first", *FIRST))
    request = ask("again", *FIRST)
    request.skip_reading_prefix_cache = True
    assert engine.hit(request) == 0


def test_a_reset_forgets_all():
    engine = Engine()
    first = ask("first", *FIRST)
    engine.prefill(first)
    engine.finish(first)
    assert engine.manager.reset_prefix_cache()
    assert engine.hit(ask("again", *FIRST)) == 0


def test_without_prefix_caching_there_is_nothing_to_find():
    engine = Engine(caching=False)
    engine.prefill(ask("first", *FIRST))
    assert engine.hit(ask("again", *FIRST)) == 0
    assert len(engine.pool.cached_block_hash_to_block) == 0


@pytest.mark.parametrize("before,prompt,hit", TABLE.values(), ids=TABLE)
def test_hits_where_the_vision_encoder_decides_first(before, prompt, hit):
    """No stage is dense: parked states alone say how far a prompt has come."""
    engine = Engine(RerouteOptions(schedule="nuwa").resolve(8))
    for number, parts in enumerate(before):
        engine.prefill(ask(f"before {number}", *parts))
    request = ask("now", *prompt)
    assert engine.prefill(request)[1] == hit
    assert engine.held(request) == engine.expected_held(request)


def test_text_behind_a_picture_is_no_text_prefix():
    """The same words in a text prompt are other blocks: their K/V does not depend on a picture."""
    engine = Engine()
    engine.prefill(ask("first", *FIRST))
    plain = [SYSTEM, Text("words", 60)]
    assert engine.hit(ask("text", *plain)) == 32
