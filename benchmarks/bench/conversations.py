"""Traffic in which prompts begin alike, inside an engine's process; see `worker.py`."""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.bench.driving import QUESTION

_numbers = itertools.count()
# Each of these is one token of the local tokenizer, so lengths are what they say.
_WORDS = ("lamp", "door", "count", "above", "below", "inside", "picture", "red", "place")


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What is asked, one request after the other.

    name: in reports. system: words of text before everything. turns: of a conversation, answered with
    `answer_tokens` each. picture_every: turns after which a new picture comes, 0 for one only.
    pictures: new ones, each behind the system text, after one more that brings that text into the
    cache. questions: about one picture, after a first one.
    """

    kind: str
    name: str
    system: int = 0
    turns: int = 1
    picture_every: int = 0
    pictures: int = 0
    questions: int = 0
    answer_tokens: int = 32


CHAT = Traffic(kind="chat", name="five turns about one picture, answers of 32 tokens", turns=5)
BRIEF = Traffic(
    kind="brief",
    name="five turns about one picture, answers of 8 tokens",
    turns=5,
    answer_tokens=8,
)
SYSTEM = Traffic(
    kind="system", name="new picture behind an 800-token system prompt", system=800, pictures=3
)
AGAIN = Traffic(kind="again", name="same picture, another question", questions=4)
TRAFFIC = (CHAT, BRIEF, SYSTEM, AGAIN)


def converse(state: dict, traffic: Traffic, seed: int) -> dict:
    """Runs the traffic from an empty cache.

    first_token_s: sum of the times to first token of the requests that count; each_s: one by one.
    held_blocks: K/V blocks of the last one while it was answered.
    cached: tokens they read from the cache, of which cached_text lie before the picture;
    prompt_tokens: of all of them. seed: other pictures and words every time.
    """
    llm = state["llm"]
    assert llm.reset_prefix_cache(), "no request is running"
    rng = random.Random(seed)
    counted = _run_of(traffic)(llm, traffic, rng)
    return {
        "first_token_s": sum(one["first_token_s"] for one in counted),
        "each_s": [one["first_token_s"] for one in counted],
        "held_blocks": counted[-1]["held_blocks"],
        **{
            key: sum(one[key] for one in counted)
            for key in ("cached", "cached_text", "prompt_tokens")
        },
    }


class Conversation:
    """One conversation as the engine is asked about it: tokens and pictures so far."""

    def __init__(self, llm: Any, traffic: Traffic, rng: random.Random) -> None:
        self._llm, self._traffic, self._rng = llm, traffic, rng
        self.turn = 0
        self.pictures: list[Any] = []
        system = traffic.system
        self.tokens = _tokenized(llm, f"SYSTEM: {sentence(rng, system)} ") if system else []

    def ask(self) -> None:
        """A new question at the end, with a new picture where one is due."""
        due = self.turn % self._traffic.picture_every if self._traffic.picture_every else self.turn
        if due == 0:
            self.pictures.append(noise(self._rng))
        words = ("" if due else "<image>\n") + sentence(self._rng, 12 if self.turn else 40)
        self.tokens = [*self.tokens, *_tokenized(self._llm, f"USER: {words} ASSISTANT:")]
        self.turn += 1

    def answered(self, answer: Sequence[int]) -> None:
        self.tokens = [*self.tokens, *answer]


def _chat(llm: Any, traffic: Traffic, rng: random.Random) -> list[dict]:
    """Every turn is the conversation so far, answer tokens and all, and a new question."""
    conversation, counted = Conversation(llm, traffic, rng), []
    for _ in range(traffic.turns):
        conversation.ask()
        one = _ask(llm, conversation.tokens, conversation.pictures, traffic.answer_tokens)
        conversation.answered(one["answer"])
        counted.append(one)
    return counted


def together(state: dict, traffic: Traffic, conversations: int, seed: int) -> dict:
    """So many conversations at once, each asking its next question when it has its answer.

    total_s: until the last answer. requests: all their questions.
    """
    llm = state["llm"]
    engine = llm.llm_engine
    assert llm.reset_prefix_cache(), "no request is running"
    rng = random.Random(seed)
    waiting = [Conversation(llm, traffic, rng) for _ in range(conversations)]
    under_way: dict[str, Conversation] = {}
    started = time.perf_counter()
    while waiting or under_way:
        for one in waiting:
            one.ask()
            under_way[_add(llm, one.tokens, one.pictures, traffic.answer_tokens)] = one
        waiting = []
        for output in engine.step():
            if output.finished:
                one = under_way.pop(output.request_id.split("-")[0])
                one.answered(output.outputs[0].token_ids)
                waiting += [one] * (one.turn < traffic.turns)
    return {
        "total_s": time.perf_counter() - started,
        "requests": conversations * traffic.turns,
    }


def _system(llm: Any, traffic: Traffic, rng: random.Random) -> list[dict]:
    text = f"SYSTEM: {sentence(rng, traffic.system)} USER: <image>\n"
    counted = []
    for _ in range(1 + traffic.pictures):
        tokens = _tokenized(llm, f"{text}{sentence(rng, 40)} ASSISTANT:")
        counted.append(_ask(llm, tokens, [noise(rng)], 1))
    return counted[1:]


def _again(llm: Any, traffic: Traffic, rng: random.Random) -> list[dict]:
    picture, counted = noise(rng), []
    for _ in range(1 + traffic.questions):
        tokens = _tokenized(llm, f"USER: <image>\n{sentence(rng, 40)} ASSISTANT:")
        counted.append(_ask(llm, tokens, [picture], 1))
    return counted[1:]


def _run_of(traffic: Traffic) -> Callable[[Any, Traffic, random.Random], list[dict]]:
    if traffic.pictures:
        return _system
    return _again if traffic.questions else _chat


def beside_long_prompt(state: dict, images: int, others: int, seed: int) -> dict:
    """A prompt of many pictures arrives while others decode.

    steps_s: every step of the others from its arrival to its first token, which is what lies between
    two of their tokens. first_token_s: of the long prompt.
    """
    llm = state["llm"]
    engine = llm.llm_engine
    assert llm.reset_prefix_cache(), "no request is running"
    rng = random.Random(seed)
    for _ in range(others):
        tokens = _tokenized(llm, f"USER: <image>\n{sentence(rng, 40)} ASSISTANT:")
        _add(llm, tokens, [noise(rng)], 400)
    seen: set[str] = set()
    while len(seen) < others:
        seen |= {output.request_id for output in engine.step()}
    tokens = _tokenized(llm, "USER: " + "<image>\n" * images + f"{sentence(rng, 40)} ASSISTANT:")
    pictures = [noise(rng) for _ in range(images)]
    started = time.perf_counter()
    name = _add(llm, tokens, pictures, 1)
    stamps = [time.perf_counter()]
    ids: list[str] = []
    while name not in (request.split("-")[0] for request in ids):
        ids = [output.request_id for output in engine.step()]
        stamps.append(time.perf_counter())
    engine.abort_request([r.request_id for r in _scheduler(llm).requests.values()], internal=True)
    while engine.has_unfinished_requests():
        engine.step()
    return {
        "first_token_s": stamps[-1] - started,
        "steps_s": [after - before for before, after in itertools.pairwise(stamps)],
    }


def sentence(rng: random.Random, words: int) -> str:
    """Text of about that many tokens."""
    return QUESTION + " ".join(rng.choice(_WORDS) for _ in range(max(0, words - 12)))


def noise(rng: random.Random) -> Any:
    """A picture nobody has seen."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (336, 336, 3), np.uint8)
    return Image.fromarray(pixels)


def _tokenized(llm: Any, text: str) -> list[int]:
    return list(llm.get_tokenizer()(text, add_special_tokens=False)["input_ids"])


def _ask(llm: Any, tokens: Sequence[int], pictures: list[Any], answer_tokens: int) -> dict:
    """One request alone: time from before its pictures are processed to its first token."""
    engine = llm.llm_engine
    started = time.perf_counter()
    _add(llm, tokens, pictures, answer_tokens)
    stamps: list[float] = []
    outputs: list[Any] = []
    held = 0
    while engine.has_unfinished_requests():
        outputs = engine.step() or outputs
        if outputs:
            stamps.append(time.perf_counter())
            held = max(held, _held_blocks(llm))
    (output,) = outputs
    cached, prompt = output.num_cached_tokens or 0, list(output.prompt_token_ids)
    return {
        "first_token_s": stamps[0] - started,
        "cached": cached,
        "cached_text": min(cached, prompt.index(engine.model_config.hf_config.image_token_id)),
        "prompt_tokens": len(prompt),
        "held_blocks": held,
        "answer": list(output.outputs[0].token_ids),
    }


def _add(llm: Any, tokens: Sequence[int], pictures: list[Any], answer_tokens: int) -> str:
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": list(tokens), "multi_modal_data": {"image": pictures}}
    params = SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True)
    name = f"traffic{next(_numbers)}"
    llm.llm_engine.add_request(name, llm._preprocess_cmpl([prompt])[0], params)
    return name


def _held_blocks(llm: Any) -> int:
    """K/V blocks that requests hold now; what only the prefix cache knows is free."""
    pool = _scheduler(llm).kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


def _scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler
