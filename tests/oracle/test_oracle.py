"""The oracle is right by itself: against transformers' dense model, against transformers with
masks, and by the facts the methods promise (lengths, ranking, ties, who may come back)."""

from functools import partial

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from . import RoutedOracle
from .masked_reference import masked_forward
from .selection import highest, num_kept
from .tiny import (
    DEPTH,
    IMAGE,
    NUM_TEXT,
    PROMPT,
    TEXT_CONFIGS,
    TEXT_ONLY,
    TWO_IMAGES,
    VISUAL,
    build,
    request,
)

NEW = 5
RISING = {"layers": (1, 3, 4), "keep": (0.3, 0.6, 0.2)}
close = partial(torch.testing.assert_close, rtol=0, atol=5e-5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Checkpoints by family, built once."""
    built = {}

    def get(family="llama"):
        if family not in built:
            built[family] = build(tmp_path_factory.mktemp(family), family)
        return built[family]

    return get


def oracle(checkpoint, action="reroute", layers=(), keep=(), family="llama", **options):
    return RoutedOracle(checkpoint(family), action=action, layers=layers, keep=keep, **options)


def plain(checkpoint, family="llama"):
    return LlavaForConditionalGeneration.from_pretrained(
        checkpoint(family), attn_implementation="eager", dtype=torch.float32
    ).eval()


@pytest.mark.parametrize(
    "family,prompt,num_images",
    [
        *((family, PROMPT, 1) for family in TEXT_CONFIGS),
        ("llama", TWO_IMAGES, 2),
        ("llama", TEXT_ONLY, 0),
    ],
)
def test_dense_equals_generate(checkpoint, family, prompt, num_images):
    inputs = request(prompt, num_images)
    result = oracle(checkpoint, family=family).run(inputs, NEW)
    expect = plain(checkpoint, family).generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert result.token_ids == expect.sequences[0, len(prompt) :].tolist()
    close(result.logprobs, torch.cat(expect.logits).log_softmax(dim=-1))
    assert result.kv_lens == [len(prompt) + NEW - 1] * DEPTH
    assert (result.selected, result.scores) == ([], [])


@pytest.mark.parametrize("family", TEXT_CONFIGS)
@pytest.mark.parametrize("action", ["remove", "reroute"])
def test_routed_equals_masked_transformers(checkpoint, family, action):
    schedule = {"action": action, **RISING}
    result = oracle(checkpoint, family=family, **schedule).run(request(TWO_IMAGES, 2), NEW)
    logprobs, selected = masked_forward(
        plain(checkpoint, family), request(TWO_IMAGES, 2), result.token_ids, **schedule
    )
    assert result.selected == selected
    assert result.token_ids == logprobs.argmax(dim=-1).tolist()
    close(result.logprobs, logprobs)


@pytest.mark.parametrize(
    "action,layers,keep,visual_lens",
    [
        ("remove", (2,), (0.5,), [25, 25, 12, 12, 12, 12]),
        ("reroute", (2,), (0.5,), [25, 25, 12, 12, 12, 12]),
        ("remove", (1, 3, 4), (0.3, 0.6, 0.2), [25, 7, 7, 7, 5, 5]),
        ("reroute", (1, 3, 4), (0.3, 0.6, 0.2), [25, 7, 7, 15, 5, 5]),
        ("remove", (1, 2, 5), (0.01, 1.0, 0.4), [25, 1, 1, 1, 1, 1]),
        ("reroute", (1, 2, 5), (0.01, 1.0, 0.4), [25, 1, 25, 25, 25, 10]),
        ("remove", (3, 4), (0.4, 0.4), [25, 25, 25, 10, 10, 10]),
    ],
)
def test_kv_holds_text_and_kept_tokens(checkpoint, action, layers, keep, visual_lens):
    result = oracle(checkpoint, action, layers, keep).run(request(PROMPT, 1), NEW)
    assert result.kv_lens == [NUM_TEXT + visual + NEW - 1 for visual in visual_lens]
    assert [len(kept) for kept in result.selected] == [visual_lens[layer] for layer in layers]


@pytest.mark.parametrize(
    "num_visual,keep,left,expect",
    [
        (576, 0.2644, 576, 152),
        (576, 0.01916, 576, 11),
        (576, 0.0106, 18, 6),
        (1152, 0.2644, 1152, 304),
        (10, 0.01, 10, 1),
        (10, 0.9, 4, 4),
        (0, 0.5, 0, 0),
    ],
)
def test_num_kept(num_visual, keep, left, expect):
    assert num_kept(num_visual, keep, left) == expect


@pytest.mark.parametrize("action", ["remove", "reroute"])
def test_keeping_all_equals_dense(checkpoint, action):
    dense = oracle(checkpoint).run(request(PROMPT, 1), NEW)
    full = oracle(checkpoint, action, (1, 3, 4), (1.0, 1.0, 1.0)).run(request(PROMPT, 1), NEW)
    assert full.selected == [list(range(VISUAL))] * 3
    assert full.token_ids == dense.token_ids
    assert full.kv_lens == dense.kv_lens
    close(full.logprobs, dense.logprobs)


@pytest.mark.parametrize("action", ["remove", "reroute"])
def test_kept_are_the_highest_scores(checkpoint, action):
    result = oracle(checkpoint, action, **RISING).run(request(PROMPT, 1), NEW)
    candidates = list(range(VISUAL))
    for kept, scores in zip(result.selected, result.scores, strict=True):
        assert scores.dtype == torch.float32
        assert kept == sorted(set(kept))
        score_of = dict(zip(candidates, scores.tolist(), strict=True))
        passed_over = [score_of[token] for token in candidates if token not in kept]
        assert min(score_of[token] for token in kept) >= max(passed_over, default=0.0)
        candidates = kept if action == "remove" else candidates


def test_highest_prefers_the_lower_position_among_equals():
    scores = torch.tensor([0.1, 0.5, 0.5, 0.2, 0.5])
    candidates = [3, 4, 7, 8, 20]
    assert highest(scores, candidates, 2) == [4, 7]
    assert highest(scores, candidates, 4) == [4, 7, 8, 20]
    assert highest(scores, candidates, 5) == candidates


def test_a_blind_query_keeps_the_first_tokens(checkpoint):
    tied = oracle(checkpoint, "reroute", (2,), (0.4,))
    torch.nn.init.zeros_(tied.model.model.language_model.layers[2].self_attn.q_proj.weight)
    result = tied.run(request(PROMPT, 1), 1)
    close(result.scores[0], torch.full((VISUAL,), 1 / len(PROMPT)))
    assert result.selected == [list(range(10))]


def test_removed_tokens_stay_away(checkpoint):
    result = oracle(checkpoint, "remove", **RISING).run(request(PROMPT, 1), NEW)
    first, second, third = result.selected
    assert [len(scores) for scores in result.scores] == [VISUAL, 7, 7]
    assert first == second  # the ratio rises, but only these are left
    assert set(third) < set(second)


def test_deferred_tokens_can_return(checkpoint):
    result = oracle(checkpoint, "reroute", **RISING).run(request(PROMPT, 1), NEW)
    first, second, third = (set(kept) for kept in result.selected)
    assert [len(scores) for scores in result.scores] == [VISUAL] * 3
    assert second - first
    assert third - second  # also where the ratio falls


def test_deferred_hidden_states_wait_unchanged(checkpoint):
    """Whoever was deferred in every stage so far enters a decision as it left layer 0."""
    routed = oracle(checkpoint, "reroute", (1, 3), (0.2, 0.2))
    inputs = {}
    project = routed._decoder.project

    def spy(layer, hidden, positions):
        # The first look at a decision layer's input is the scorer's, at all candidates.
        inputs.setdefault(layer, hidden.clone())
        return project(layer, hidden, positions)

    routed._decoder.project = spy
    result = routed.run(request(PROMPT, 1), 1)
    first_visual = PROMPT.index(IMAGE)
    for token in range(VISUAL):
        before, after = (inputs[layer][first_visual + token] for layer in (1, 3))
        assert torch.equal(before, after) == (token not in result.selected[0])


def test_accumulated_scores_are_the_sum_of_those_at_the_same_decisions(checkpoint):
    """All are kept until the last decision, so that both see the same states."""
    schedule = {"layers": (1, 2, 3), "keep": (1.0, 1.0, 0.2)}
    alone = oracle(checkpoint, "reroute", **schedule).run(request(PROMPT, 1), 1)
    summed = oracle(checkpoint, "reroute", **schedule, accumulates=True).run(request(PROMPT, 1), 1)
    for number, scores in enumerate(summed.scores):
        close(scores, torch.stack(alone.scores[: number + 1]).sum(dim=0))
    assert summed.selected[2] != alone.selected[2]


def test_actions_agree_on_a_single_decision(checkpoint):
    schedule = {"layers": (2,), "keep": (0.3,)}
    removed = oracle(checkpoint, "remove", **schedule).run(request(PROMPT, 1), NEW)
    rerouted = oracle(checkpoint, "reroute", **schedule).run(request(PROMPT, 1), NEW)
    assert removed.selected == rerouted.selected
    assert removed.kv_lens == rerouted.kv_lens
    assert removed.token_ids == rerouted.token_ids
    close(removed.logprobs, rerouted.logprobs)


def test_actions_differ_on_several_decisions(checkpoint):
    removed = oracle(checkpoint, "remove", **RISING).run(request(PROMPT, 1), NEW)
    rerouted = oracle(checkpoint, "reroute", **RISING).run(request(PROMPT, 1), NEW)
    assert removed.selected != rerouted.selected
    assert (removed.logprobs[0] - rerouted.logprobs[0]).abs().max() > 1e-2


def test_images_are_ranked_jointly(checkpoint):
    result = oracle(checkpoint, "reroute", (2, 4), (0.3, 0.1)).run(request(TWO_IMAGES, 2), NEW)
    assert [len(scores) for scores in result.scores] == [2 * VISUAL] * 2
    assert [len(kept) for kept in result.selected] == [15, 5]
    for kept, scores in zip(result.selected, result.scores, strict=True):
        assert kept == sorted(scores.topk(len(kept)).indices.tolist())
    from_first = [sum(token < VISUAL for token in kept) for kept in result.selected]
    assert from_first[0] not in (7, 8)  # an equal share per image would be
    num_text = len(TWO_IMAGES) - 2 * VISUAL
    assert result.kv_lens == [num_text + k + NEW - 1 for k in (50, 50, 15, 15, 5, 5)]


@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_score_is_the_row_of_the_attention_map(checkpoint, family):
    layer = 3
    result = oracle(checkpoint, "remove", (layer,), (0.3,), family).run(request(PROMPT, 1), 1)
    with torch.inference_mode():
        attentions = plain(checkpoint, family)(
            **request(PROMPT, 1), output_attentions=True
        ).attentions
    is_visual = torch.tensor(PROMPT) == IMAGE
    expect = attentions[layer][0, :, -1, is_visual].mean(dim=0)
    torch.testing.assert_close(result.scores[0], expect, rtol=0, atol=1e-6)
    assert expect.std() > 1e-3  # far from uniform, or agreement would say little


def test_text_only_is_dense_under_any_schedule(checkpoint):
    routed = oracle(checkpoint, "reroute", **RISING).run(request(TEXT_ONLY), NEW)
    dense = oracle(checkpoint).run(request(TEXT_ONLY), NEW)
    assert routed.selected == [[], [], []]
    assert [len(scores) for scores in routed.scores] == [0, 0, 0]
    assert routed.token_ids == dense.token_ids
    close(routed.logprobs, dense.logprobs)


def test_forced_tokens_are_fed(checkpoint):
    routed = oracle(checkpoint, "reroute", **RISING)
    free = routed.run(request(PROMPT, 1), NEW)
    same = routed.run(request(PROMPT, 1), NEW, forced_token_ids=free.token_ids)
    close(same.logprobs, free.logprobs)
    other = [(token + 1) % IMAGE for token in free.token_ids]
    forced = routed.run(request(PROMPT, 1), NEW, forced_token_ids=other)
    assert forced.token_ids == other
    assert forced.selected == free.selected
    close(forced.logprobs[0], free.logprobs[0])
    expect, _ = masked_forward(
        plain(checkpoint), request(PROMPT, 1), other, action="reroute", **RISING
    )
    close(forced.logprobs, expect)


def test_stops_at_eos_only_when_asked(checkpoint):
    routed = oracle(checkpoint, "reroute", **RISING)
    free = routed.run(request(PROMPT, 1), NEW)
    eos = free.token_ids[2]
    routed.model.generation_config.eos_token_id = [eos]
    assert routed.run(request(PROMPT, 1), NEW).token_ids == free.token_ids
    stopped = routed.run(request(PROMPT, 1), NEW, stop_at_eos=True)
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(eos) + 1]
    assert len(stopped.logprobs) == len(stopped.token_ids)


def test_bf16_follows_fp32(checkpoint):
    exact = oracle(checkpoint, "reroute", **RISING).run(request(PROMPT, 1), NEW)
    rounded = oracle(checkpoint, "reroute", **RISING, dtype=torch.bfloat16).run(
        request(PROMPT, 1), NEW, forced_token_ids=exact.token_ids
    )
    assert rounded.logprobs.dtype == rounded.scores[0].dtype == torch.float32
    assert not torch.equal(rounded.scores[0], exact.scores[0])
    torch.testing.assert_close(rounded.scores[0], exact.scores[0], rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    "schedule,message",
    [
        ({"action": "drop"}, "action 'drop'"),
        ({"layers": (2, 3), "keep": (0.5,)}, "differ in length"),
        ({"layers": (0,), "keep": (0.5,)}, "increase strictly"),
        ({"layers": (3, 3), "keep": (0.5, 0.5)}, "increase strictly"),
        ({"layers": (DEPTH,), "keep": (0.5,)}, "increase strictly"),
        ({"layers": (2,), "keep": (0.0,)}, "lie in"),
        ({"layers": (2,), "keep": (1.5,)}, "lie in"),
    ],
)
def test_a_wrong_schedule_is_refused(checkpoint, schedule, message):
    with pytest.raises(ValueError, match=message):
        oracle(checkpoint, **schedule)


@pytest.mark.parametrize(
    "prompt,num_images,options,message",
    [
        (PROMPT, 2, {}, "25 placeholders"),
        (PROMPT, 0, {}, "give 0 features"),
        (TEXT_ONLY, 1, {}, "0 placeholders"),
        (PROMPT[:-4], 1, {}, "end in a text token"),
        ([], 0, {}, "end in a text token"),
        (PROMPT, 1, {"max_new_tokens": 0}, "at least 1"),
        (PROMPT, 1, {"forced_token_ids": [5]}, "as many tokens as steps"),
    ],
)
def test_a_wrong_request_is_refused(checkpoint, prompt, num_images, options, message):
    with pytest.raises(ValueError, match=message):
        oracle(checkpoint).run(request(prompt, num_images), **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize(
    "family,options",
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ],
)
def test_a_sliding_window_is_refused(tmp_path, family, options):
    with pytest.raises(ValueError, match="sliding_window"):
        oracle(lambda _: build(tmp_path, family, **options))


def test_an_idle_sliding_window_is_accepted(tmp_path):
    build(tmp_path, "qwen2", use_sliding_window=False, sliding_window=8)
    assert oracle(lambda _: tmp_path).depth == DEPTH
