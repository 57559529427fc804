"""Turns of a prompt: where they end, and what stages have run by then, against counting one by one."""

import random
from dataclasses import replace

import pytest

from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.turns import Cut, Turn, Turns, cut_at_markers
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.schedule import RoutingSchedule

MARKER = (8, 9)
VISUAL, WORD = 5, 1
KEEP = (0.5, 1.0, 0.1)
SCHEDULE = RoutingSchedule(
    name="custom",
    action="reroute",
    num_layers=6,
    layers=(2, 3, 5),
    keep=KEEP,
    history="keep",
    marker=MARKER,
)


def conversation(rng, marker=MARKER, pictures=(0, 1, 2), most=4):
    """A prompt and its spans: up to `most` turns, with as many pictures as one of `pictures` says."""
    prompt, starts, ends = [WORD] * rng.randint(0, 9), [], []
    for _ in range(rng.randint(1, most)):
        for _ in range(rng.choice(pictures)):
            starts.append(len(prompt))
            prompt += [VISUAL] * rng.randint(1, 30)
            ends.append(len(prompt))
            prompt += [WORD] * rng.randint(0, 4)
        prompt += [*marker, *[WORD] * rng.randint(0, 9)]
    return prompt, VisualSpans(tuple(starts), tuple(ends)) if starts else None


def routing_of(seed, schedule=SCHEDULE, **options):
    rng = random.Random(seed)
    spans = None
    while spans is None:
        prompt, spans = conversation(rng, **options)
    return prompt, RequestRouting.of(spans, prompt, schedule, 4)


def by_hand(prompt):
    """[begin, end, size] of each turn, token by token."""
    turns, open_turn = [], None
    for position, token in enumerate(prompt):
        if token == VISUAL:
            open_turn = open_turn or [position, None, 0]
            open_turn[2] += 1
        if open_turn and tuple(prompt[position - 1 : position + 1]) == MARKER:
            open_turn[1] = position + 1
            turns.append(open_turn)
            open_turn = None
    return turns


def test_turns_are_what_counting_tokens_gives():
    for seed in range(60):
        check(*routing_of(seed))


def check(prompt, routing):
    turns = routing.turns
    (_, *first), *later = by_hand(prompt)
    found = [[turn.begin, turn.end, turn.size] for turn in turns.turns]
    assert found == [[routing.text_prefix, *first], *later]
    for turn in turns.turns:
        assert turn.kept == (turn.size, *(max(1, int(turn.size * ratio)) for ratio in KEEP))
    check_lengths(prompt, routing)


def check_lengths(prompt, routing):
    turns = routing.turns
    allowed = [n for n in range(len(prompt) + 9) if turns.allowed(n) == n]
    inside = [n for n in range(len(prompt) + 9) if turns.open_at(n)]
    assert sorted(allowed + inside) == [*range(len(prompt) + 9)]
    for n in inside:
        assert turns.allowed(n) == max(m for m in allowed if m < n)
        assert turns.open_at(n).end == turns.next_end(n) == min(m for m in allowed if m > n)
    for stage in range(1, len(KEEP) + 1):
        entries = {n: turns.length(stage, n) for n in allowed}
        for n in allowed:
            gone = sum(turn.deferred(stage) for turn in turns.turns if turn.end <= n)
            assert entries[n] == n - gone == routing.kv_length(stage, n)
        for length in range(entries[allowed[-1]] + 1):
            assert turns.needed(stage, length) == min(n for n in allowed if entries[n] >= length)
            assert turns.reach(stage, length) == max(n for n in allowed if entries[n] <= length)


def recalled_by_hand(prompt, marker):
    """[begin, end, visual tokens of it or before it, kept] of each turn, token by token, and how many
    follow-ups found no room."""
    turns, sizes, visual, first, full = [], [], 0, None, 0
    held = [0] * len(KEEP)
    for position, token in enumerate(prompt):
        end = position + 1
        if token == VISUAL:
            first, visual = position if visual == 0 else first, visual + 1
        if tuple(prompt[end - len(marker) : end]) != marker or end < len(marker):
            continue
        if visual:
            counts = [max(1, int(visual * ratio)) for ratio in KEEP]
            turns.append([first, end, visual, (visual, *counts)])
            sizes.append(visual)
        elif turns:
            begin = max(turns[-1][1], end - max(2, len(marker)))
            room = [
                min(
                    max(1, int(max(1, int(sum(sizes) * ratio)) / 4)),
                    2 * sum(max(1, int(size * ratio)) for size in sizes) - has,
                    sum(sizes) - has,
                )
                for ratio, has in zip(KEEP, held, strict=True)
            ]
            counts = [max(0, count) for count in room]
            full += not any(counts)
            if end - begin < 2 or not any(counts):
                continue
            turns.append([begin, end, sum(sizes), (0, *counts)])
        else:
            continue
        held = [has + count for has, count in zip(held, counts, strict=True)]
        visual = 0
    return turns, full


@pytest.mark.parametrize("marker", [(8, 9), (9,), (9, 9), (8, 7, 8), (8, 7, 6, 9)], ids=str)
def test_later_turns_recall_what_counting_tokens_gives(marker):
    """Also where markers follow on each other, or overlap, and until there is no more room."""
    schedule = replace(SCHEDULE, history="recall", marker=marker)
    num_recalling, num_full = 0, 0
    for seed in range(60):
        prompt, routing = routing_of(
            seed, schedule, marker=marker, pictures=((0, 1, 2), (0, 0, 0, 1))[seed % 2], most=30
        )
        ((_, *first), *later), full = recalled_by_hand(prompt, marker)
        turns = routing.turns.turns
        found = [[turn.begin, turn.end, turn.size, turn.kept] for turn in turns]
        assert found == [[routing.text_prefix, *first], *later]
        assert [turn.recalls for turn in turns] == [turn.kept[0] == 0 for turn in turns]
        check_lengths(prompt, routing)
        for stage in range(1, len(KEEP) + 1):
            own = sum(turn.kept[stage] for turn in turns if not turn.recalls)
            assert routing.kept[stage] <= min(2 * own, routing.spans.num_visual)
        num_recalling += sum(turn.recalls for turn in turns)
        num_full += full
    assert num_recalling > 60 and num_full > 20


def test_a_prompt_is_one_turn_unless_its_history_keeps():
    prompt = [1] * 6 + [5] * 10 + [8, 9] + [1] * 5 + [5] * 4 + [8, 9, 1]
    spans = VisualSpans((6, 23), (16, 27))
    schedule = SCHEDULE.from_dict({**SCHEDULE.to_dict(), "history": "rerank"})
    routing = RequestRouting.of(spans, prompt, schedule, 4)
    assert routing.turns.turns == (Turn(4, 30, 14, (14, 7, 14, 1), 27),)
    asked = {"reroute": {"history": "keep"}}
    keeps = RequestRouting.of(spans, prompt, schedule, 4, asked)
    assert keeps.turns.turns == (
        Turn(4, 18, 10, (10, 5, 10, 1), 16),
        Turn(23, 29, 4, (4, 2, 4, 1), 27),
    )
    assert keeps.kept == (14, 7, 14, 2) and keeps.seed(keeps.turns.turns[0]) != routing.seed(
        routing.turns.turns[0]
    )


def test_chance_falls_alike_when_a_turn_comes_back():
    """In a later prompt of the same conversation, which goes on with another picture."""
    prompt = [WORD] * 6 + [VISUAL] * 10 + [*MARKER]
    longer = [*prompt, WORD, *[VISUAL] * 4, *MARKER]
    first = RequestRouting.of(VisualSpans((6,), (16,)), prompt, SCHEDULE, 4)
    later = RequestRouting.of(VisualSpans((6, 19), (16, 23)), longer, SCHEDULE, 4)
    again, other = map(later.seed, later.turns.turns)
    assert first.seed(first.turns.turns[0]) == again != other


def test_a_picture_needs_a_marker_behind_it():
    spans = VisualSpans((1,), (4,))
    assert cut_at_markers(spans, [1, 5, 5, 5, 8, 9], MARKER) == [Cut(1, 6, 3, 4)]
    # The answer's own end is none, and what is before the picture asks for something else.
    for prompt in ([1, 5, 5, 5, 8, 1, 9], [8, 5, 5, 5, 9, 1], [9, 5, 5, 5], [5]):
        with pytest.raises(ValueError, match="no marker"):
            cut_at_markers(spans, prompt, MARKER)


def test_who_has_no_turn_defers_nothing():
    assert Turns(()).needed(1, 7) == Turns(()).reach(1, 7) == Turns(()).length(1, 7) == 7
