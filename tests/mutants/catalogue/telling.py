"""Decisions that are told wrongly, twice, too late, or to nobody."""

from tests.mutants.mutant import Mutant

_ANY_STEP = "tests/unit/test_token_state.py::test_any_step"
_TURNS = "tests/unit/test_decided_turns.py"

TELLING = (
    Mutant(
        name="scores-of-who-is-gone",
        file="vllm_reroute/routing/step_decisions.py",
        old="            self._among = len(self._decisions) - 1\n",
        new="            pass\n",
        killers=(_ANY_STEP,),
    ),
    Mutant(
        name="told-of-the-token-before",
        file="vllm_reroute/routing/step_decisions.py",
        old="        kept = kept[:, prefill.start : prefill.start + prefill.num_turn_rows]\n",
        new="        kept = np.roll(kept, 1)[:, prefill.start : prefill.start + prefill.num_turn_rows]\n",
        killers=(_ANY_STEP,),
    ),
    Mutant(
        name="brought-back-from-the-last-stage-only",
        file="vllm_reroute/plan/decided_turn.py",
        old="        everywhere &= own\n",
        new="        everywhere = own\n",
        killers=(_ANY_STEP,),
    ),
    Mutant(
        name="brought-back-by-the-last-request-only",
        file="vllm_reroute/metrics/counting.py",
        old="[BROUGHT_BACK.series(str(stage))] += count",
        new="[BROUGHT_BACK.series(str(stage))] = count",
        killers=(f"{_TURNS}::test_tokens_brought_back_are_counted",),
    ),
    Mutant(
        name="told-again-after-a-preemption",
        file="vllm_reroute/kv_cache/decided_turns.py",
        old=" and turn.end > self._ends.get(request_id, 0)",
        new="",
        killers=(f"{_TURNS}::test_it_leaves_with_the_next_output_and_is_counted_once",),
    ),
    Mutant(
        name="told-kept-for-who-is-gone",
        file="vllm_reroute/kv_cache/decided_turns.py",
        old="        self._told = {name: told for name, told in self._told.items() if name in self._requests}\n",
        new="",
        killers=(f"{_TURNS}::test_what_an_aborted_request_was_to_be_told_is_dropped",),
    ),
    Mutant(
        name="turns-remembered-for-ever",
        file="vllm_reroute/kv_cache/decided_turns.py",
        old="        self._ends.pop(request.request_id, None)\n",
        new="        pass\n",
        killers=(f"{_TURNS}::test_it_leaves_with_the_next_output_and_is_counted_once",),
    ),
    Mutant(
        name="a-step-waits-for-its-decisions",
        file="vllm_reroute/runners/worker.py",
        old="        if isinstance(output, AsyncModelRunnerOutput):\n",
        new="        if False:\n",
        killers=(f"{_TURNS}::test_a_worker_says_what_its_step_has_decided",),
    ),
    Mutant(
        name="a-stock-worker",
        file="vllm_reroute/startup/engine_config.py",
        old="    parallel.worker_cls = routed_worker(parallel.worker_cls)\n",
        new="",
        killers=(f"{_TURNS}::test_a_routed_engine_has_such_a_worker",),
    ),
    Mutant(
        name="cached-turns-are-not-told",
        file="vllm_reroute/kv_cache/kept_turns.py",
        old="        if routing.explain:\n",
        new="        if False:\n",
        killers=(
            "tests/unit/test_kept_turns.py"
            "::test_a_request_that_wants_to_be_told_decides_all_its_turns",
        ),
    ),
    Mutant(
        name="decisions-of-the-warm-up-are-told",
        file="vllm_reroute/runners/warm_up.py",
        old="            self.model.routed_decoder.take_decisions()\n",
        new="",
        killers=(
            "tests/unit/test_runners.py::test_v2_warms_up_every_stage_once_and_leaves_nothing",
        ),
    ),
    Mutant(
        name="asking-is-choosing",
        file="vllm_reroute/schedule/request_options.py",
        old="        if not self.chooses:\n            return schedule\n",
        new="",
        killers=(
            "tests/unit/test_request_options.py"
            "::test_a_request_that_wants_to_be_told_changes_nothing",
        ),
    ),
)
