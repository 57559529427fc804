"""The arithmetic of conversations, against pairs of tokens counted one by one and against one request."""

from dataclasses import replace

import pytest

from vllm_reroute.command_line.conversations import conversation_lines
from vllm_reroute.schedule import RerouteOptions
from vllm_reroute.schedule.conversation_cost import ConversationCost

from .test_cost_model import LLAVA_7B, TOY, VISUAL, DecoderShape, cost_of

OPTIONS = {"layers": [1, 2], "keep": [0.5, 0.25]}
REMOVE = {**OPTIONS, "action": "remove"}


def conversation(options=OPTIONS, decoder=TOY, **changes):
    cost = ConversationCost(
        decoder=decoder,
        vision=None,
        schedule=RerouteOptions.from_mapping(options).resolve(decoder.num_layers),
        num_visual=20,
        turns=4,
        questions_per_image=2,
        question=5,
        answer=3,
    )
    return replace(cost, **changes)


@pytest.mark.parametrize("options", [OPTIONS, REMOVE])
def test_one_turn_is_one_request(options):
    one = conversation(options, num_visual=VISUAL, turns=1)
    request = cost_of(options, image_sizes=(VISUAL,), num_text=5)
    assert one.stock() == [request.dense_flops]
    assert one.rerank() == one.keep() == [request.routed_flops]
    if one.can_recall:
        assert one.recall() == one.keep()


@pytest.mark.parametrize("every", [1, 2, 4])
def test_turns_run_what_is_new_and_see_what_is_there(every):
    cost = conversation(questions_per_image=every)
    head = 2 * TOY.hidden_size * TOY.vocab_size
    present = [0] * len(cost.schedule.stages)
    for turn, found in enumerate(cost.keep()):
        expect, ranked = head, cost.num_visual + cost.question
        for stage, kept in enumerate(cost.schedule.kept_per_stage(cost.num_visual)):
            rows = cost.question + kept * (turn % every == 0)
            pairs = sum(present[stage] + row for row in range(1, rows + 1))
            layer = 2 * rows * TOY.layer_parameters + 4 * TOY.query_size * pairs
            expect += cost.schedule.stages[stage].num_layers * layer
            expect += TOY.decision_flops(ranked) * (turn % every == 0 and stage > 0)
            present[stage] += rows + cost.answer
        assert found == expect


@pytest.mark.parametrize(
    "keep,every,brought",
    [
        # 10 and 5 of 20 visual tokens, a quarter of them a question.
        ([0.5, 0.25], 4, [None, (2, 1), (2, 1), (2, 1)]),
        # Of two pictures' tokens together once the second is there.
        ([0.5, 0.25], 2, [None, (2, 1), None, (5, 2)]),
        # 2 and 1 of them: one at least, and no more than twice that in all.
        ([0.1, 0.05], 4, [None, (1, 1), (1, 0), (0, 0)]),
        # 18 of them: no more than there are.
        ([0.9, 0.5], 4, [None, (2, 2), (0, 2), (0, 2)]),
    ],
)
def test_recalling_turns_rank_what_is_parked_and_run_what_they_bring_back(keep, every, brought):
    cost = conversation({"layers": [1, 2], "keep": keep}, questions_per_image=every)
    kept, stages = cost.schedule.kept_per_stage(cost.num_visual), cost.schedule.stages
    held, extra = [0, 0, 0], []
    for turn, came in enumerate(brought):
        visual = kept if came is None else (0, *came)
        before = turn * (cost.question + cost.answer)
        total = 0
        for stage, rows, there in zip(stages, visual, held, strict=True):
            pairs = sum(before + there + row for row in range(1, cost.question + rows + 1))
            layer = 2 * (cost.question + rows) * TOY.layer_parameters + 4 * TOY.query_size * pairs
            total += stage.num_layers * layer
        pictures = turn // every + 1
        decisions = 2 if came is None else sum(map(bool, came))
        of = cost.num_visual * (1 if came is None else pictures) + cost.question
        total += decisions * TOY.decision_flops(of)
        extra.append(total + 2 * TOY.hidden_size * TOY.vocab_size)
        held = [there + rows for there, rows in zip(held, visual, strict=True)]
    assert cost.recall() == extra
    text = cost.turns * (cost.question + cost.answer)
    assert cost.held("recall") == sum(
        stage.num_layers * (text + there) for stage, there in zip(stages, held, strict=True)
    )


def test_what_a_conversation_holds_at_its_end():
    cost = conversation(questions_per_image=2)
    text, pictures = cost.turns * (cost.question + cost.answer), 2
    assert cost.held(None) == TOY.num_layers * (text + pictures * cost.num_visual)
    kept = cost.schedule.kept_per_stage(cost.num_visual)
    entries = [text + pictures * each for each in kept]
    expect = sum(s.num_layers * n for s, n in zip(cost.schedule.stages, entries, strict=True))
    assert cost.held("keep") == cost.held("rerank") == expect < cost.held("recall")


def test_advice_follows_the_numbers():
    cost = conversation(
        {"schedule": "pdrop", "tier": 192},
        DecoderShape.of(LLAVA_7B.text_config),
        num_visual=576,
        turns=5,
        questions_per_image=5,
        question=50,
        answer=50,
    )
    lines = "\n".join(conversation_lines(cost))
    assert sum(cost.keep()) < sum(cost.stock()) < sum(cost.rerank())
    assert "rerank has cost more than stock from turn 3 on" in lines and "history keep, at" in lines
    share = sum(cost.recall()) / sum(cost.rerank())
    assert f"--reroute-history recall, at {share:.2f} of rerank's prefill" in lines
    assert "up to 0.25 of what a stage keeps" in lines and "holds 2 times what keep holds" in lines
    ends = next(line for line in lines.splitlines() if "K/V at the end" in line).split()[-4:]
    held = [cost.held(name) / cost.held(None) for name in ("rerank", "keep", "recall")]
    assert ends == ["1.00", *(f"{each:.2f}" for each in held)]
    once = "\n".join(conversation_lines(replace(cost, turns=1)))
    assert "less than stock in all of it" in once and "history rerank, keep would save" in once
    remove = RerouteOptions(schedule="pdrop", action="remove").resolve(32)
    removed = "\n".join(conversation_lines(replace(cost, schedule=remove)))
    assert "recall is not available with --reroute-action remove" in removed
    assert "recall, at" not in removed and "history keep, at" in removed
    schedule = RerouteOptions(schedule="nuwa").resolve(32)
    assert "not available with nuwa" in "\n".join(
        conversation_lines(replace(cost, schedule=schedule))
    )
