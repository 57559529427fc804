"""Later turns that bring visual tokens back."""

from tests.mutants.mutant import Mutant

_PAGES = "tests/unit/test_recallable_pages.py::"

RECALLING = (
    Mutant(
        name="states-not-looked-for",
        file="vllm_reroute/kv_cache/kept_turns.py",
        old="        if reached < hit:\n",
        new="        if reached > hit:\n",
        killers=(_PAGES + "test_a_picture_whose_states_are_gone_runs_again",),
    ),
    Mutant(
        name="shared-page-written",
        file="vllm_reroute/kv_cache/parked_manager.py",
        old="            self._to_copy[request_id] = count - 1\n",
        new="            pass\n",
        killers=(_PAGES + "test_a_page_that_another_turn_goes_on_in_is_copied",),
    ),
    Mutant(
        name="pages-let-go-between-turns",
        file="vllm_reroute/kv_cache/parked_manager.py",
        old=" and not routing.awaits(num_computed):",
        new=":",
        killers=(_PAGES + "test_pages_stay_until_the_last_turn_that_looks_back_is_decided",),
    ),
    Mutant(
        name="no-cap",
        file="vllm_reroute/schedule/recall.py",
        old="RECALL_CAP * kept - held",
        new="9 * RECALL_CAP * kept - held",
        killers=(_PAGES + "test_a_turn_brings_back_a_quarter_until_the_cap_is_reached",),
    ),
    Mutant(
        name="both-histories-share-blocks",
        file="vllm_reroute/kv_cache/turn_keys.py",
        old="how = routing.keep, routing.recalls, kind, index",
        new="how = routing.keep, kind, index",
        killers=(_PAGES + "test_both_histories_decide_apart",),
    ),
    Mutant(
        name="copies-forget-what-they-hold",
        file="vllm_reroute/routing/held_tokens.py",
        old="        by_block[copies] = by_block[source]\n",
        new="",
        killers=("tests/unit/test_held_tokens.py::test_a_block_takes_them_along",),
    ),
    Mutant(
        name="text-leaves-what-was-there",
        file="vllm_reroute/routing/held_tokens.py",
        old="        self._all()[slots] = numbers\n",
        new="        self._all()[slots] = numbers.maximum(self._all()[slots])\n",
        killers=("tests/unit/test_held_tokens.py::test_text_overwrites_what_a_block_held_before",),
    ),
    Mutant(
        name="a-later-turn-replaces-what-was-told",
        file="vllm_reroute/plan/decided_turn.py",
        old="        return before | told\n",
        new="        return told\n",
        killers=(
            "tests/unit/test_decided_turns.py::test_a_turn_that_looks_back_adds_to_what_was_told",
        ),
    ),
)
