"""Later turns that bring visual tokens back."""

from tests.mutants.mutant import Mutant

_PAGES = "tests/unit/test_recallable_pages.py::"

COLD_AND_CACHED = (
    "tests/engine/test_recalled_turns.py::"
    "test_a_conversation_is_the_same_cold_and_turn_by_turn[v1-in-chunks]"
)

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
    Mutant(
        name="recalled-in-front-of-the-whole-turn",
        file="vllm_reroute/plan/request_routing.py",
        old="begin = max(min(one.first, one.end - LAST_TOKENS), turns[-1].end)",
        new="begin = max(min(one.first, one.end - LAST_TOKENS) - 3, turns[-1].end)",
        killers=("tests/unit/test_turns.py",),
    ),
    Mutant(
        name="held-tokens-chosen-again",
        file="vllm_reroute/routing/selection.py",
        old="return stays if prompts.held is None else stays | prompts.held",
        new="return stays",
        killers=(
            "tests/unit/test_selection.py::"
            "test_what_a_stage_holds_is_not_brought_back_whatever_its_score",
        ),
    ),
    Mutant(
        name="held-tokens-are-keys-twice",
        file="vllm_reroute/routing/prompt_rows.py",
        old="            if self.held is not None:\n",
        new="            if self.held is None and self.held is not None:\n",
        killers=(COLD_AND_CACHED,),
    ),
    Mutant(
        name="numbers-stay-when-blocks-are-copied",
        file="vllm_reroute/runners/worker.py",
        old="        if copies:\n",
        new="        if copies and not copies:\n",
        killers=(COLD_AND_CACHED,),
    ),
    Mutant(
        name="found-turns-offer-their-pages-again",
        file="vllm_reroute/kv_cache/recallable_pages.py",
        old="if turn.end <= self._parked.num_found(keys.request.request_id):",
        new="if turn.end < 0:",
        killers=("tests/unit/test_found_pages.py::test_who_finds_a_turn_offers_none_of_its_pages",),
    ),
    Mutant(
        name="worker-without-a-found-picture",
        file="vllm_reroute/kv_cache/scheduler.py",
        old="        self._send_late_pictures(output)\n",
        new="",
        killers=(
            "tests/unit/test_scheduler.py::test_who_found_its_picture_in_the_cache_can_still_run_it",
        ),
    ),
)
