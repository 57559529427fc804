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
    once = "\n".join(conversation_lines(replace(cost, turns=1)))
    assert "less than stock in all of it" in once and "history rerank, keep would save" in once
    schedule = RerouteOptions(schedule="nuwa").resolve(32)
    assert "not available with nuwa" in "\n".join(
        conversation_lines(replace(cost, schedule=schedule))
    )
