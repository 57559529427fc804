"""Progress of one request token by token, as the design states it, to compare fast plans with."""

import random
from dataclasses import dataclass, field

from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.schedule import RoutingSchedule

BLOCK = 4
DENSE_FIRST = RoutingSchedule(
    name="custom", action="reroute", num_layers=6, layers=(2, 3, 5), keep=(0.5, 0.1, 0.5)
)
ENCODER_FIRST = RoutingSchedule(
    name="nuwa", action="reroute", num_layers=6, layers=(0, 3), keep=(0.5, 0.1), variant="B"
)
SCHEDULES = (DENSE_FIRST, ENCODER_FIRST)


@dataclass
class SlowRequest:
    """What each stage has run of a request, and which tokens wait for its decisions.

    spans: None for a text request. kv: per stage, prompt positions in the order of their K/V.
    waiting: positions that have run the stages before the first decision only.
    """

    schedule: RoutingSchedule
    num_prompt: int
    spans: VisualSpans | None
    chance: random.Random
    num_run: int = 0
    kv: list[list[int]] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.kv = [[] for _ in self.schedule.stages]
        self.dense = int(self.schedule.encoder_ratio is None)

    @property
    def routing(self):
        return RequestRouting.of(self.spans, range(self.num_prompt), self.schedule, BLOCK)

    @property
    def visual(self):
        pairs = zip(self.spans.starts, self.spans.ends, strict=True) if self.spans else ()
        return {position for start, end in pairs for position in range(start, end)}

    @property
    def text_prefix(self):
        """Tokens in blocks before the one with the first visual token; all of a text request."""
        return min(self.visual) // BLOCK * BLOCK if self.spans else 10**9

    def run(self, num_tokens):
        """Run more tokens as one step; returns what the step did, see `Did`."""
        did = Did(
            stages=[[] for _ in self.kv], before=list(self.waiting), held=[*map(len, self.kv)]
        )
        for position in range(self.num_run, self.num_run + num_tokens):
            did.ran.append(position)
            for stage in range(self.dense):
                did.stages[stage].append(position)
            if self.text_prefix <= position < self.num_prompt:
                self.waiting.append(position)
                if position == self.num_prompt - 1:
                    did.decides = True
                    self._decide(did)
            else:
                self._run_later(did, position)
        for entries, ran in zip(self.kv, did.stages, strict=True):
            entries += ran
        self.num_run += num_tokens
        return did

    def _run_later(self, did, position):
        did.candidates.append(position)
        for ran in did.stages[self.dense :]:
            ran.append(position)

    def _decide(self, did):
        """Whichever visual tokens are chosen, this many of them run."""
        did.candidates += self.waiting
        visual = sorted(self.visual)
        for stage in range(self.dense, len(self.kv)):
            kept = self.chance.sample(visual, self.routing.kept[stage])
            did.stages[stage] += [p for p in self.waiting if p not in self.visual or p in kept]
        self.waiting.clear()


@dataclass
class Did:
    """A step of one request, all by prompt position.

    stages: what ran there. candidates: what was at the first decision's input. ran: the step's own
    tokens. before: tokens that had been waiting. held: K/V entries per stage before the step.
    """

    stages: list[list[int]]
    before: list[int]
    held: list[int]
    candidates: list[int] = field(default_factory=list)
    ran: list[int] = field(default_factory=list)
    decides: bool = False


def random_spans(rng, num_prompt):
    """One to three images anywhere, the last prompt token excepted."""
    cuts = sorted(rng.sample(range(num_prompt), 2 * rng.randint(1, 3)))
    if rng.random() < 0.2:
        cuts[0] = 0
    return VisualSpans(tuple(cuts[::2]), tuple(cuts[1::2]))


def random_request(rng, schedule):
    """A request that has come any way, in steps of any size."""
    num_prompt = rng.randint(1, 60)
    image = num_prompt >= 8 and rng.random() < 0.7
    spans = random_spans(rng, num_prompt) if image else None
    request = SlowRequest(schedule, num_prompt, spans, rng)
    at = rng.choice((0, rng.randint(0, num_prompt), num_prompt - 1, num_prompt + rng.randint(0, 9)))
    while request.num_run < at:
        request.run(rng.randint(1, at - request.num_run))
    return request


def random_scheduled(rng, request):
    """Tokens of the next step: some, up to the last but one, all of the prompt, or more."""
    left = request.num_prompt - request.num_run
    if left <= 0:
        return rng.randint(1, 5)
    return rng.choice((rng.randint(1, left), max(1, left - 1), left, left + rng.randint(1, 9)))
