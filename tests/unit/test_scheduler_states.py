"""Any traffic through vLLM's schedulers with routing, and what must be true after every step.

`SCHEDULER_EXAMPLES=2000` runs that many random histories of each kind instead of a few.
"""

import os
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm.v1.request import RequestStatus

from vllm_reroute.plan.chunks import fewest_step_tokens
from vllm_reroute.schedule import CONFIG_KEY, RoutingSchedule

from .parts import feature, make_request
from .scheduler_steps import Steps
from .slow_worker import ANSWER

BLOCK = 4
LONGEST = 96
PICTURE = 8
EXAMPLES = int(os.environ.get("SCHEDULER_EXAMPLES", 8))
STEPS = 60
SCHEDULES = {
    "dense first": {"layers": [3, 5], "keep": [0.5, 0.25]},
    "encoder first": {"schedule": "nuwa"},
    "keeps turns": {
        "layers": [3, 5],
        "keep": [0.5, 0.25],
        "history": "keep",
        "turn_marker": "ASSISTANT:",
    },
    "recalls": {
        "layers": [3, 5],
        "keep": [0.5, 0.25],
        "history": "recall",
        "turn_marker": "ASSISTANT:",
    },
}


@pytest.fixture(scope="module")
def configs(engine_config):
    common = {"max_model_len": LONGEST, "enable_prefix_caching": True}
    return {
        name: engine_config(**common, additional_config={CONFIG_KEY: options})
        for name, options in SCHEDULES.items()
    }


class Traffic(RuleBasedStateMachine):
    """Requests of all kinds come, run, wait, are preempted, aborted and forgotten by the cache."""

    config = None
    """vLLM's config, set by the test."""

    seen = None
    """Counts what has happened in all histories together, set by the test."""

    @initialize(
        asynchronous=st.booleans(),
        caching=st.sampled_from((True, True, False)),
        policy=st.sampled_from(("fcfs", "priority")),
        budget=st.integers(3, 40),
        threshold=st.sampled_from((0, 0, 5, 12)),
        room=st.sampled_from((0, 0, 8, 40)),
        encoder_cache=st.integers(PICTURE, 4 * PICTURE),
        encoder_step=st.integers(PICTURE, 3 * PICTURE),
        running=st.integers(2, 8),
    )
    def start(
        self,
        asynchronous,
        caching,
        policy,
        budget,
        threshold,
        room,
        encoder_cache,
        encoder_step,
        running,
    ):
        # Empty where turns are not kept.
        self.marker = [*RoutingSchedule.of(self.config).marker]
        # Less is refused at start.
        fewest = fewest_step_tokens(self.marker)
        budget, threshold = max(budget, fewest), threshold and max(threshold, fewest)
        scheduler_config = self.config.scheduler_config
        scheduler_config.policy = policy
        scheduler_config.max_num_scheduled_tokens = budget
        scheduler_config.long_prefill_token_threshold = threshold
        scheduler_config.max_num_seqs = running
        # vLLM starts only with room for one request of the longest kind.
        self.steps = Steps(
            self.config,
            units=LONGEST // BLOCK,
            parked_units=LONGEST // BLOCK + room,
            caching=caching,
            asynchronous=asynchronous,
            block_size=BLOCK,
            encoder_cache=encoder_cache,
        )
        self.scheduler = self.steps.scheduler
        self.scheduler.max_num_encoder_input_tokens = encoder_step
        self.depth = 2 if asynchronous else 1
        self.number, self.all, self.idle = 0, [], 0

    def teardown(self):
        if not hasattr(self, "steps"):
            return
        live = self.scheduler.requests.values()
        # One request at least comes on by a token in every step that is not idle.
        limit = 20 + 4 * sum(r.num_prompt_tokens + r.max_tokens for r in live)
        while self.scheduler.has_unfinished_requests():
            assert limit > 0, "requests wait for ever"
            limit -= 1
            self.step()
        while self.steps.in_flight:
            self.steps.answer()
        assert self.steps.pool.get_num_free_blocks() == self.steps.capacity
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        assert not any(manager.num_cached_block for manager in managers)
        encoder_cache = self.scheduler.encoder_cache_manager
        assert not encoder_cache.request_cached_ids and not any(encoder_cache.cached.values())
        self.seen["reused"] += self.steps.worker.num_reused
        self.seen["fetched"] += self.steps.worker.num_fetched
        self.seen["copied"] += self.steps.worker.num_copied
        self.seen["recalled"] += self.steps.worker.num_recalled
        for request in self.all:
            self.seen["preempted"] += request.num_preemptions
            if request.status is RequestStatus.FINISHED_LENGTH_CAPPED:
                assert request.num_output_tokens == request.max_tokens
                assert set(request.output_token_ids) == {ANSWER}

    @rule(seed=st.integers(0, 2**32), count=st.integers(1, 6))
    def arrive(self, seed, count):
        """Text and pictures in any order, from few words and pictures, so that prompts agree."""
        chance = random.Random(seed)
        for _ in range(count):
            tokens, pictures = [], []
            for _ in range(chance.choice((0, 0, 1, 1, 2, 3))):
                tokens += self._words(chance, chance.choice((0, 1, 4, 5, 9)))
                pictures.append(self._picture(chance, len(tokens)))
                tokens += [0] * pictures[-1].mm_position.length
                tokens += self._question(chance) if chance.random() < 0.5 else []
            # The last token must be text, but a placeholder may end with it.
            ends = bool(pictures) and pictures[-1].identifier[0] == "c" and chance.random() < 0.5
            tokens += self._words(chance, 0 if ends else chance.randint(1, 20)) + self.marker
            self._add(chance, tokens, pictures)

    @precondition(lambda self: self.all)
    @rule(seed=st.integers(0, 2**32), what=st.sampled_from(("next turn", "other question", "same")))
    def ask_again(self, seed, what):
        """A later turn of a conversation, or what has been asked about the same beginning."""
        chance = random.Random(seed)
        before = chance.choice(self.all)
        if what == "same":
            for _ in range(chance.randint(1, 3)):
                self._add(chance, list(before.prompt_token_ids), before.mm_features)
            return
        if what == "next turn":
            tokens = [*before.all_token_ids, *self._question(chance)]
        else:
            end = max(
                (f.mm_position.offset + f.mm_position.length for f in before.mm_features), default=4
            )
            tokens = [*before.prompt_token_ids[:end], *self._question(chance)]
        pictures = list(before.mm_features)
        if chance.random() < 0.3:
            pictures.append(self._picture(chance, len(tokens)))
            tokens += [0] * pictures[-1].mm_position.length + self._question(chance)
        self._add(chance, tokens, pictures)

    def _words(self, chance, count):
        """One of two ways to go on."""
        first = chance.choice((100, 100, 200))
        return [*range(first, first + count)]

    def _question(self, chance):
        return self._words(chance, chance.randint(1, 9)) + self.marker

    def _picture(self, chance, offset):
        """One of three; some placeholders hold separators, also behind the last visual token."""
        name = chance.choice("abc")
        separators = {"a": None, "b": [1, 1, 0, 1, 1, 1, 0, 1], "c": [1, 1, 1, 1, 1, 1, 0, 0]}[name]
        return feature(offset, PICTURE, separators, name=name)

    def _add(self, chance, tokens, pictures):
        if len(tokens) > LONGEST - 2:
            return
        self.number += 1
        request = make_request(
            f"r{self.number}",
            tokens,
            pictures,
            block_size=BLOCK,
            max_tokens=min(chance.choice((1, 9, 30, 60)), LONGEST - len(tokens)),
            priority=chance.randint(0, 2),
            arrival_time=float(self.number),
            cache_salt=chance.choice((None, None, None, "salt")),
        )
        if self.marker:
            kinds = (None, None, {"history": "rerank"}, {"history": "keep"}, {"keep": [0.25, 0.25]})
            own = chance.choice(kinds)
            request.sampling_params.extra_args = own and {"reroute": own}
        self.all.append(request)
        self.steps.add(request)

    @rule(times=st.integers(1, 15))
    def run(self, times):
        for _ in range(times):
            self.step()

    def step(self):
        """With asynchronous scheduling the next step is planned before the last one's answer."""
        waiting = self.scheduler.has_unfinished_requests()
        awaited = len(self.steps.in_flight)
        scheduled = self.steps.schedule()
        self.seen["steps"] += 1
        # Whoever is in flight, or a single idle step after a preemption, may let something go.
        self.idle = 0 if scheduled or awaited or not waiting else self.idle + 1
        assert self.idle < 3, "nothing runs and nothing is awaited: this stops for ever"
        if len(self.steps.in_flight) >= self.depth or not scheduled:
            self.steps.answer()

    @precondition(lambda self: len(self.scheduler.requests) > 2)
    @rule(seed=st.integers(0, 2**32))
    def abort(self, seed):
        name = random.Random(seed).choice([*self.scheduler.requests])
        self.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)

    @rule(running=st.sampled_from((False, False, False, True)))
    def reset_prefix_cache(self, running):
        self.scheduler.reset_prefix_cache(reset_running_requests=running)

    @rule(seed=st.integers(0, 2**32))
    def evict(self, seed):
        chance, pool = random.Random(seed), self.steps.pool
        cached = [block.block_id for block in pool.blocks if block.block_hash is not None]
        pool.evict_blocks(set(chance.sample(cached, min(len(cached), 3))))


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_history_keeps_the_books_and_ends(configs, name):
    seen = Counter()
    machine = type("Traffic", (Traffic,), {"config": configs[name], "seen": seen})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize="SCHEDULER_EXAMPLES" not in os.environ,
            suppress_health_check=[*HealthCheck],
        ),
    )
    assert seen["steps"] > 100 * EXAMPLES
    # It was about something: blocks were short, prompts began alike, tokens waited in pages.
    kinds = ["preempted", "reused", "fetched", *["copied"] * (name in ("keeps turns", "recalls"))]
    kinds += ["recalled"] * (name == "recalls")
    assert all(seen[what] > EXAMPLES for what in kinds), seen
