"""Blocks lost, shared too early, or found by someone they do not belong to."""

from tests.mutants.mutant import Mutant

POOL = (
    Mutant(
        name="hit-forgotten-while-it-is-admitted",
        file="vllm_reroute/kv_cache/parked_manager.py",
        old="self._missing(request_id, before, self.num_found(request_id), num_tokens)",
        new="self._missing(request_id, before, 0, num_tokens)",
        killers=(
            "tests/unit/test_kept_turns.py::"
            "test_a_hit_behind_the_first_turn_takes_none_of_its_pages",
        ),
    ),
    Mutant(
        name="pages-offered-but-not-written",
        file="vllm_reroute/plan/planning.py",
        old="stop[prefill.index] = min(turn.end, blocks.stop * block_size)",
        new="stop[prefill.index] = 0",
        killers=(
            "tests/unit/test_scheduler.py::"
            "test_a_conversation_that_begins_otherwise_goes_on_where_the_cache_ends",
        ),
    ),
    Mutant(
        name="budget-unknown-to-the-scheduler",
        file="vllm_reroute/kv_cache/live_routing.py",
        old='getattr(request.sampling_params, "extra_args", None)',
        new="None",
        killers=("tests/unit/test_metrics.py::test_counts_are_those_of_the_requests",),
    ),
    Mutant(
        name="keep-hits-in-the-same-step",
        file="vllm_reroute/kv_cache/stage_manager.py",
        old="whole = self.stage < routing.dense_stages and not routing.keeps_turns",
        new="whole = self.stage < routing.dense_stages",
        killers=("tests/unit/test_kept_turns.py::test_a_step_that_has_not_run_is_not_found",),
    ),
    Mutant(
        name="keep-offers-what-has-not-run",
        file="vllm_reroute/kv_cache/kept_turns.py",
        old="do not count.\n        num_tokens = min(request.num_computed_tokens, request.num_tokens)",
        new="do not count.\n        num_tokens = request.num_tokens",
        killers=("tests/unit/test_kept_turns.py",),
    ),
    Mutant(
        name="tail-key-without-its-question",
        file="vllm_reroute/kv_cache/turn_keys.py",
        old="BlockHash(sha256((parent, tokens, extra)))",
        new="BlockHash(sha256((parent, len(tokens), extra)))",
        killers=("tests/unit/test_kept_turns.py::test_hits",),
    ),
    Mutant(
        name="key-without-its-budget",
        file="vllm_reroute/kv_cache/turn_keys.py",
        old="how = routing.keep, routing.recalls, kind, index",
        new="how = routing.recalls, kind, index",
        killers=("tests/unit/test_kept_turns.py::test_what_is_kept_depends_on_how_much",),
    ),
    Mutant(
        name="shared-block-not-copied",
        file="vllm_reroute/kv_cache/stage_manager.py",
        old="            self._to_copy[request_id] = len(new_computed_blocks) - 1\n",
        new="",
        killers=("tests/unit/test_kept_turns.py::test_a_block_in_which_a_hit_ends_is_copied",),
    ),
    Mutant(
        name="parked-pages-kept-after-prefill",
        file="vllm_reroute/kv_cache/scheduler.py",
        old="        self.parked_pages.release_decided()\n",
        new="",
        killers=(
            "tests/unit/test_scheduler.py::test_pages_are_released_right_after_the_step_that_decides",
        ),
    ),
    Mutant(
        name="whole-prompt-a-hit",
        file="vllm_reroute/kv_cache/prefix_hits.py",
        old="(turn.end - 1) // size",
        new="turn.end // size",
        killers=("tests/unit/test_prefix_hits.py::test_hits",),
    ),
    Mutant(
        name="parked-hit-of-k-v-alone",
        file="vllm_reroute/kv_cache/prefix_hits.py",
        old="            if not all(found):\n",
        new="            if not any(found):\n",
        killers=("tests/unit/test_prefix_hits.py::test_a_lost_page_ends_the_hit_there",),
    ),
    Mutant(
        name="first-layer-speaks-for-all",
        file="vllm_reroute/kv_cache/layer_entries.py",
        old="if all(block.block_hash is own for block in blocks):",
        new="if blocks:",
        killers=("tests/unit/test_kv_manager.py::test_one_evicted_layer_ends_the_hit_there",),
    ),
    Mutant(
        name="another-layer-of-the-same-tokens",
        file="vllm_reroute/kv_cache/layer_entries.py",
        old="block.block_hash is own for",
        new="block.block_hash == own for",
        killers=(
            "tests/unit/test_layer_entries.py::"
            "test_a_layer_s_block_may_serve_another_layer_of_the_same_tokens",
        ),
    ),
    Mutant(
        name="admission-forgets-waiting-pages",
        file="vllm_reroute/kv_cache/parked_manager.py",
        old="in_one_step=not apply_admission_cap",
        new="in_one_step=True",
        killers=(
            "tests/unit/test_parked_pages.py::test_admission_counts_pages_a_prompt_will_need",
        ),
    ),
    Mutant(
        name="decode-outgrows-its-blocks",
        file="vllm_reroute/kv_cache/decode_blocks.py",
        old="return min(limits)",
        new="return max(limits)",
        killers=("tests/unit/test_scheduler.py::test_any_traffic_is_planned_and_ends",),
    ),
    Mutant(
        name="decode-skips-a-stage",
        file="vllm_reroute/kv_cache/decode_blocks.py",
        old="for manager, count in zip(self._stages, missing, strict=True):\n            if count:",
        new="for manager, count in zip(self._stages, missing, strict=True):\n"
        "            if count and manager.stage:",
        killers=("tests/unit/test_scheduler.py::test_any_traffic_is_planned_and_ends",),
    ),
    Mutant(
        name="dropped-step-found-in-the-cache",
        file="vllm_reroute/kv_cache/scheduler.py",
        old="manager.withdraw(request)",
        new="pass",
        killers=(
            "tests/unit/test_scheduler.py::test_what_a_preempted_step_was_to_write_is_not_found",
        ),
    ),
    Mutant(
        name="blocks-freed-from-the-front",
        file="vllm_reroute/kv_cache/scheduler.py",
        old="free_blocks(reversed(interleaving.by_tokens(groups)))",
        new="free_blocks(interleaving.by_tokens(groups))",
        killers=("tests/unit/test_scheduler.py::test_text_is_scheduled_as_by_stock_vllm",),
    ),
    Mutant(
        name="decisions-larger-than-a-step",
        file="vllm_reroute/kv_cache/scheduler.py",
        old="count * width > self.max_num_scheduled_tokens",
        new="width > self.max_num_scheduled_tokens",
        killers=("tests/unit/test_scheduler.py::test_steps",),
    ),
    Mutant(
        name="stages-merged-into-one-group",
        file="vllm_reroute/kv_cache/spec.py",
        old="if any(spec != first for spec in specs):",
        new="if not specs:",
        killers=("tests/unit/test_kv_groups.py",),
    ),
    Mutant(
        name="created-cache-tokens-as-stock-counts-them",
        file="vllm_reroute/kv_cache/scheduler.py",
        old="        hooked.estimate_cached_tokens = hits.num_offered\n",
        new="",
        killers=("tests/unit/test_scheduler.py::test_text_is_scheduled_as_by_stock_vllm",),
    ),
    Mutant(
        name="pictures-never-count-as-offered",
        file="vllm_reroute/kv_cache/prefix_hits.py",
        old="managers = self._stages if routing is None else self._reusable",
        new="managers = self._stages",
        killers=("tests/unit/test_prefix_hits.py::test_what_is_offered_of_a_live_request",),
    ),
)
