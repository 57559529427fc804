"""The trial of `recall` computes what it says: `keep` and `rerank` are the oracle's, and recall only adds to `keep`."""

import pytest
import torch

from benchmarks.quality.recall.decoder import Decoder
from benchmarks.quality.recall.history import History, Recall, Schedule, Turn
from tests.oracle import RecallOracle, RoutedOracle
from tests.oracle.tiny import DEPTH, IMAGE, VISUAL, build, request

from .recall_by_hand import recalled

LAYERS, KEEP = (1, 3, 4), (0.3, 0.6, 0.2)
SCHEDULE = Schedule(LAYERS, KEEP, DEPTH)
PICTURE = [IMAGE] * VISUAL
# Question and answer of each turn; pictures come with the first and the third.
TURNS = (
    ([1, 11, 12, *PICTURE, 13, 14], [15, 16]),
    ([17, 18, 19], [20, 21, 22]),
    ([23, *PICTURE, 24, 25], [26]),
    ([27, 28], [29, 30]),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("llama-mha"), "llama-mha")


@pytest.fixture(scope="module")
def oracle(folder):
    return RoutedOracle(folder, action="reroute", layers=LAYERS, keep=KEEP)


@pytest.fixture(scope="module")
def decoder(oracle):
    return Decoder(oracle.model)


def tokens(turn, of=TURNS):
    return [*of[turn][0], *of[turn][1]]


def ready(oracle, turns, of=TURNS):
    """The token rows of those turns, as one `Turn` that ends with the last one's question."""
    ids = torch.tensor([each for turn in turns for each in tokens(turn, of)])
    visual = ids == IMAGE
    rows = oracle.model.get_input_embeddings()(ids.masked_fill(visual, 0))
    pixels = request([1, *PICTURE, *PICTURE, 2], 2)["pixel_values"]
    features = torch.cat(list(oracle.model.get_image_features(pixels).pooler_output))
    first = VISUAL * sum(IMAGE in of[turn][0] for turn in range(turns[0]))
    rows[visual] = features[first : first + int(visual.sum())]
    return Turn(rows=rows, visual=visual, end=len(ids) - len(of[turns[-1]][1]))


def expected(oracle, turn, of=TURNS, **options):
    """Log-probabilities of that turn's answer, and the choices, as the oracle finds them."""
    prompt = [each for before in range(turn) for each in tokens(before, of)] + of[turn][0]
    inputs = request(prompt, 2)
    if prompt.count(IMAGE) == VISUAL:
        inputs["pixel_values"] = inputs["pixel_values"][:1]
    answer = [*of[turn][1], 0]
    return oracle.run(inputs, len(answer), answer, **options)


def talk(oracle, decoder, recall):
    """The history after each turn, and its logits."""
    history = History(decoder, SCHEDULE)
    for turn in range(len(TURNS)):
        logits = history.run(ready(oracle, [turn]), recall)
        yield history, logits


def held(history):
    """Per stage behind the first decision, which visual tokens it holds, as indices."""
    stages = range(1, len(LAYERS) + 1)
    return [set((history.slots(s) >= 0).nonzero().flatten().tolist()) for s in stages]


@torch.inference_mode()
def test_keep_is_the_oracles(oracle, decoder):
    ends = [0]
    for turn, (_, logits) in enumerate(talk(oracle, decoder, None)):
        ends[-1:] = [ends[-1] + len(TURNS[turn][0])]
        wanted = expected(oracle, turn, turn_ends=tuple(ends))
        torch.testing.assert_close(logits.log_softmax(-1), wanted.logprobs, rtol=0, atol=1e-4)
        ends.append(ends[-1] + len(TURNS[turn][1]))


@torch.inference_mode()
@pytest.mark.parametrize("turn", range(len(TURNS)))
def test_rerank_is_the_oracles(oracle, decoder, turn):
    logits = History(decoder, SCHEDULE).run(ready(oracle, range(turn + 1)))
    wanted = expected(oracle, turn)
    torch.testing.assert_close(logits.log_softmax(-1), wanted.logprobs, rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize(
    "recall",
    [
        Recall(),
        Recall(cap=1.5),
        Recall(share=0.5),
        Recall(share=0.25, absent=True, cap=2),
        Recall(share=0.25, absent=True, cap=2, text_turns=True),
        Recall(apart=True),
        Recall(arrived=True),
    ],
    ids=str,
)
def test_recall_is_what_is_written_out_by_hand(oracle, decoder, recall):
    wanted = recalled(oracle, [ready(oracle, [turn]) for turn in range(len(TURNS))], recall)
    for (_, logits), by_hand in zip(talk(oracle, decoder, recall), wanted, strict=True):
        torch.testing.assert_close(logits, by_hand, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_what_reranking_would_keep_is_added(oracle, decoder):
    """To the letter at the first decision, whose states depend on no question before it."""
    before = [set() for _ in LAYERS]
    added = 0
    for turn, (history, _) in enumerate(talk(oracle, decoder, Recall())):
        now = held(history)
        if IMAGE not in TURNS[turn][0]:
            assert now[0] == before[0] | set(expected(oracle, turn).selected[0])
            added += len(now[0] - before[0])
        assert all(few <= many for few, many in zip(before, now, strict=True))
        before = now
    assert added


@torch.inference_mode()
def test_no_stage_holds_more_than_the_cap(oracle, decoder):
    both = zip(talk(oracle, decoder, None), talk(oracle, decoder, Recall(cap=1.5)), strict=True)
    for (kept, _), (more, _) in both:
        sizes = [(len(few), len(many)) for few, many in zip(held(kept), held(more), strict=True)]
        assert all(few <= many <= 1.5 * few for few, many in sizes)
    assert any(many > few for few, many in sizes)


@torch.inference_mode()
def test_without_room_recall_is_keep(oracle, decoder):
    both = zip(talk(oracle, decoder, None), talk(oracle, decoder, Recall(cap=1)), strict=True)
    for (_, kept), (_, more) in both:
        torch.testing.assert_close(kept, more, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_how_many_are_added_is_known_ahead(oracle, decoder):
    """A share of what is not held: lengths follow from the prompt's layout, which choices cannot change."""
    cap = 2
    histories = talk(oracle, decoder, Recall(share=0.5, absent=True, cap=cap))
    counts, pictures = [0] * len(LAYERS), 0
    for turn, (history, _) in enumerate(histories):
        visual = pictures * VISUAL
        for stage in range(len(LAYERS)):
            one = SCHEDULE.kept(stage + 1, VISUAL)
            half = SCHEDULE.kept(stage + 1, visual) // 2
            room = min(cap * one * pictures, visual) - counts[stage]
            counts[stage] += min(half, room) + one * (IMAGE in TURNS[turn][0])
        pictures += IMAGE in TURNS[turn][0]
        assert [len(entries) for entries in held(history)] == counts
    assert counts[1] == 2 * VISUAL


BARE = (
    ([1, 11, 12, *PICTURE, 13, 14], [15, 16]),
    ([17, 18], [19, 20, 21]),
    ([22, *PICTURE, 23, 24], [25]),
    ([26, 27], [28, 29]),
    ([30, 31], [32]),
    ([33, 34], [35, 36]),
)
"""Questions that have no picture are nothing but the two tokens that questions end with."""


@torch.inference_mode()
@pytest.mark.parametrize("keep", [KEEP, (0.04, 0.2, 0.1), (0.5, 1.0, 0.9)], ids=str)
def test_the_oracle_of_all_turns_at_once_is_what_is_written_out_by_hand(folder, keep):
    """What is brought back stands in front of the marker there and of the turn here: the same place."""
    oracle = RecallOracle(folder, marker=2, layers=LAYERS, keep=keep)
    recall = Recall(share=0.25, absent=True, cap=2, text_turns=True)
    turns = [ready(oracle, [turn], BARE) for turn in range(len(BARE))]
    ends = [0]
    for turn, by_hand in enumerate(recalled(oracle, turns, recall)):
        ends[-1:] = [ends[-1] + len(BARE[turn][0])]
        wanted = expected(oracle, turn, BARE, turn_ends=tuple(ends))
        torch.testing.assert_close(by_hand.log_softmax(-1), wanted.logprobs, rtol=0, atol=1e-4)
        ends.append(ends[-1] + len(BARE[turn][1]))
