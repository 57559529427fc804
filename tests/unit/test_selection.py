"""The choice on the device equals what a reader would do by hand, request by request."""

from dataclasses import replace

import pytest
import torch

from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.routing.prompt_rows import PromptRows, prompt_scores, text_mask
from vllm_reroute.routing.selection import select_rows
from vllm_reroute.schedule import RerouteOptions

from .steps import Going, plan_of, routing_of

CPU = torch.device("cpu")
SCHEDULE = RerouteOptions(layers=(1, 2), keep=(0.5, 0.2)).resolve(3)
BLOCK = 4
ONE = VisualSpans((4,), (24,))
TWO = VisualSpans((1, 12), (9, 20))
START = VisualSpans((0,), (7,))
LATE = VisualSpans((14,), (24,))


def going(spans, num_prompt, computed, scheduled):
    return Going(routing_of(spans, num_prompt, SCHEDULE, BLOCK), computed, scheduled)


IMAGE = going(ONE, 30, 0, 30)
IMAGES = going(TWO, 25, 0, 25)
RESUMED = going(START, 9, 0, 15)
TEXT = Going(None, 8, 12)
DECODE = going(ONE, 30, 44, 1)
CHUNK = going(LATE, 30, 6, 12)  # runs 12 text tokens of its prompt in all stages; 6 are parked
CACHED = going(LATE, 30, 16, 14)  # its first 12 tokens are in the pages of all stages
LAST = going(ONE, 30, 29, 3)  # only its last prompt token runs before the decision


class Step:
    """A planned batch in the layout of its candidates."""

    def __init__(self, *batch):
        self.batch = batch
        self.plan = plan_of(batch, SCHEDULE, BLOCK)
        self.prompts = PromptRows.of(self.plan, None, CPU)
        self.text = text_mask(self.plan, CPU)
        self.visual = ~self.text

    def select(self, scores, stage):
        num_kept = [p.routing.kept[stage] for p in self.plan.prefills]
        num_selected = self.plan.stages[stage].num_tokens
        return select_rows(scores, self.text, self.prompts, num_kept, num_selected).tolist()

    def table(self, per_request):
        """fp32 [requests, width] from one row of scores a prefill."""
        scores = torch.zeros(len(self.prompts.lens), self.prompts.width)
        for i, row in enumerate(per_request):
            scores[i, : len(row)] = row
        return scores

    def random_scores(self, seed=0):
        """Odd seeds give few different values, so that most choices have ties."""
        generator = torch.Generator().manual_seed(seed)
        scores = [torch.rand(n, generator=generator) for n in self.prompts.lens]
        return [(row * 4).floor() for row in scores] if seed % 2 else scores

    def by_hand(self, per_request, stage):
        """Rows that run: text and decodes, and of each prompt the best visual tokens, in order."""
        rows = [row for row in range(len(self.visual)) if not self.visual[row]]
        for prefill, scores in zip(self.plan.prefills, per_request, strict=True):
            spans = prefill.routing.spans
            places = [
                p
                for start, end in zip(spans.starts, spans.ends, strict=True)
                for p in range(start, end)
            ]
            best = sorted(places, key=lambda p: (-float(scores[p]), p))
            first = prefill.start - prefill.first
            rows += [first + p for p in best[: prefill.routing.kept[stage]]]
        return sorted(rows)


BATCHES = {
    "one image": (IMAGE,),
    "two images in a prompt": (IMAGES,),
    "resumed": (RESUMED,),
    "cached text before the image": (CACHED,),
    "only the last token runs": (LAST,),
    "image requests of different lengths": (IMAGES, IMAGE, RESUMED),
    "mixed": (TEXT, IMAGE, DECODE, CACHED, DECODE, IMAGES, CHUNK, TEXT, RESUMED, LAST),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("stage", [1, 2])
def test_the_best_run_in_order(batch, stage):
    step = Step(*batch)
    for seed in range(4):
        scores = step.random_scores(seed)
        selected = step.select(step.table(scores), stage)
        assert selected == step.by_hand(scores, stage)
        assert len(selected) == step.plan.stages[stage].num_tokens


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_ratio_of_1_keeps_all(batch):
    step = Step(*batch)
    num_kept, count = [p.routing.kept[0] for p in step.plan.prefills], len(step.visual)
    table = step.table(step.random_scores())
    selected = select_rows(table, step.text, step.prompts, num_kept, count)
    assert selected.tolist() == list(range(count))


@pytest.mark.parametrize(
    "scores,kept",
    [
        ([1.0] * 20, range(10)),
        ([0.0] * 20, range(10)),
        ([*[0.1] * 15, *[0.5] * 5], [*range(5), *range(15, 20)]),
        ([0.5, 0.1] * 10, range(0, 20, 2)),
        ([0.1] * 5 + [0.5] * 4 + [0.1] * 11, range(10)),
    ],
)
def test_ties_go_to_the_lower_position(scores, kept):
    step = Step(IMAGE)
    row = torch.zeros(30)
    row[4:24] = torch.tensor(scores)
    assert step.select(step.table([row]), 1) == [*range(4), *(4 + k for k in kept), *range(24, 30)]


def test_text_runs_whatever_it_scores():
    step = Step(*BATCHES["mixed"])
    scores = step.random_scores()
    for prefill, row in zip(step.plan.prefills, scores, strict=True):
        row[~torch.from_numpy(prefill.routing.spans.mask(len(row)))] = -5.0
    assert step.select(step.table(scores), 2) == step.by_hand(scores, 2)
    text = [row for row in range(len(step.visual)) if not step.visual[row]]
    assert set(text) <= set(step.select(step.table(scores), 2))


@pytest.mark.parametrize("request_,first", [(IMAGE, 0), (CACHED, 12)], ids=["rows", "cached"])
def test_text_takes_no_place_of_a_visual_token(request_, first):
    step = Step(request_)
    scores = torch.arange(30.0).flip(0)  # the text before the image scores highest
    kept, start = request_.routing.kept[2], request_.routing.spans.first
    places = [*range(first, start + kept), *range(24, 30)]
    assert step.select(step.table([scores]), 2) == [p - first for p in places]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_choice_does_not_depend_on_the_batch(stage):
    alone, together = Step(IMAGES), Step(TEXT, IMAGE, IMAGES, DECODE, CACHED, RESUMED)
    scores = together.random_scores(seed=7)
    own = alone.select(alone.table([scores[1]]), stage)
    start = together.plan.prefills[1].start
    rows = together.select(together.table(scores), stage)
    assert [row - start for row in rows if start <= row < start + 25] == own


def test_only_candidates_are_chosen_from():
    """`remove`: what an earlier stage dropped is no row of the layout; here, no candidate."""
    step = Step(IMAGE)
    text = step.text.clone()
    text[4:14] = True  # ten visual rows left to choose from, the others count as text
    scores = torch.arange(30.0).flip(0)
    rows = select_rows(step.table([scores]), text, step.prompts, [4], 24)
    assert rows.tolist() == [*range(14), *range(14, 18), *range(24, 30)]


def test_prompt_rows_of_a_mixed_step():
    step = Step(TEXT, IMAGE, DECODE, CHUNK, CACHED, RESUMED)
    prompts = step.prompts
    assert prompts.lens == (30, 30, 9) and prompts.num_cached == (0, 12, 0)
    # 12 rows of text, 1 of a decode, 6 of a chunk (its text up to 12), 18 behind cached text.
    assert prompts.rows.tolist() == [*range(12, 42), *range(49, 67), *range(67, 76)], (
        "the 6 resumed tokens are no prompt"
    )
    assert prompts.last.tolist() == [41, 66, 75]
    # A place without a row of its own, cached or past the end, has that of the last token.
    assert prompts.table.tolist() == [
        [*range(12, 42)],
        [*[66] * 12, *range(49, 67)],
        [*range(67, 76), *[75] * 21],
    ]
    # Keys of the 12 cached tokens come first.
    assert prompts.keys.view(3, 30).tolist() == [
        [*range(12, 42)],
        [*range(12), *range(42, 60)],
        [*range(60, 69), *[0] * 21],
    ]
    assert prompts.cached.request.tolist() == [4] * 12
    assert prompts.cached.position.tolist() == [*range(12)]
    visual = [*range(16, 36), *range(51, 61), *range(67, 74)]
    assert step.visual.nonzero().flatten().tolist() == visual
    assert prompts.num_rows == 82 and not prompts.are_all_rows

    compact = PromptRows.of(step.plan, 2, CPU)
    assert compact.lens == (14, 22, 3) and compact.num_cached == (0, 12, 0)
    assert compact.rows.tolist() == [*range(12, 26), *range(33, 43), *range(43, 46)]
    assert compact.last.tolist() == [25, 42, 45]
    assert compact.num_visual == (4, 2, 1)
    assert compact.num_rows == 12 + 14 + 1 + 6 + 10 + 9


def test_rows_of_text_that_others_may_read():
    """Blocks that get full in this step, of text alone; only looked at where text is cached."""
    step = Step(TEXT, IMAGE, DECODE, CHUNK, CACHED, RESUMED)
    shared = step.prompts.shared
    tokens = [(0, p) for p in range(8, 20)]  # the text request, its blocks of 4 complete
    tokens += [(1, p) for p in range(4)]  # the first block of the image prompt
    tokens += [(3, p) for p in range(6, 12)]  # what the chunk adds to its text
    assert list(zip(shared.request.tolist(), shared.position.tolist(), strict=True)) == tokens
    rows = [*range(12), *range(12, 16), *range(43, 49)]
    assert step.prompts.key_rows[: len(shared)].tolist() == rows
    assert PromptRows.of(step.plan, 2, CPU).key_rows[: len(shared)].tolist() == [
        *range(12),
        *range(12, 16),
        *range(27, 33),
    ]
    assert not len(Step(TEXT, IMAGE, RESUMED).prompts.shared), "nobody reads cached text"


@pytest.mark.parametrize("scheduled,shared", [(3, 0), (4, 4), (7, 4), (8, 8)])
def test_a_block_in_the_making_is_nobody_else_s(scheduled, shared):
    step = Step(Going(None, 0, scheduled), CACHED)
    assert len(step.prompts.shared) == shared


def test_all_rows():
    assert Step(IMAGE, IMAGES).prompts.are_all_rows
    assert Step(CACHED, IMAGES).prompts.are_all_rows
    assert not Step(RESUMED).prompts.are_all_rows
    assert not Step(IMAGE, DECODE).prompts.are_all_rows


def test_scores_of_rows_as_a_table():
    step = Step(TEXT, CACHED, RESUMED)
    of_rows = torch.arange(float(step.prompts.num_rows))
    table = prompt_scores(of_rows, step.prompts)
    assert table.tolist() == [
        [29.0] * 12 + [float(row) for row in range(12, 30)],
        [float(row) for row in range(30, 39)] + [38.0] * 21,
    ]


def test_rows_that_score():
    step = Step(TEXT, IMAGE, RESUMED, LAST)
    queries = step.prompts.query_rows(1)
    assert queries.rows.tolist() == [41, 50, 82]
    assert queries.weights is None
    assert queries.hidden.sum(dim=2).flatten().tolist() == [0, 21, 0]
    assert queries is step.prompts.query_rows(1), "made once for all decisions"
    assert Step(IMAGE, CACHED).prompts.query_rows(1).hidden is None, "as long as each other"

    short = PromptRows.of(Step(going(VisualSpans((0,), (7,)), 8, 0, 8)).plan, 2, CPU)
    assert short.lens == (2,)
    queries = short.query_rows(3)
    assert queries.rows.tolist() == [1, 0, 1]
    assert queries.weights.tolist() == [[0, 0.5, 0.5]], "a row that is not there weighs nothing"
    assert queries.hidden[0].tolist() == [[False, True], [False, True], [False, False]]


def test_the_first_of_each_row_of_a_table():
    """Whether the numbers were sent with the rows, as those of the stage decided for are, or not."""
    step = Step(IMAGES, IMAGE)
    kept = tuple(p.routing.kept[1] for p in step.plan.prefills)
    assert min(kept) < max(kept)
    for prompts in (step.prompts, PromptRows.of(step.plan, None, CPU, 1)):
        for counts in (kept, (2, 3), (3, 3)):
            first = [i * max(counts) + j for i, n in enumerate(counts) for j in range(n)]
            assert prompts.first_of_each(counts).tolist() == first
    even = PromptRows.of(Step(IMAGE, IMAGE).plan, None, CPU, 1)
    kept = IMAGE.routing.kept[1]
    assert even.first_of_each([kept] * 2).tolist() == list(range(2 * kept))


def test_places_behind_a_prompt_s_end():
    step = Step(IMAGES, IMAGE, RESUMED)
    assert step.prompts.past_end.sum(dim=2).flatten().tolist() == [5, 0, 21]
    assert step.prompts.past_end[2, 0].tolist() == [False] * 9 + [True] * 21
    assert Step(IMAGE, IMAGE).prompts.past_end is None


class Holding:
    """In place of what stages hold: these of the only prompt's visual tokens."""

    def __init__(self, numbers):
        self.numbers = torch.tensor(numbers)

    def among(self, stage, entries, first, shape):
        held = torch.zeros(shape, dtype=torch.bool)
        held.view(-1)[first[0] + self.numbers] = True
        return held


def test_what_a_stage_holds_is_not_brought_back_whatever_its_score():
    """A score need not come from attention, where what is no key has none."""
    schedule = replace(SCHEDULE, history="recall", marker=(8, 9))
    prompt = [1] * 26 + [8, 9] + [1] * 4 + [8, 9]
    plan = plan_of([Going(routing_of(ONE, prompt, schedule, BLOCK), 28, 6)], schedule, BLOCK)
    (prefill,) = plan.prefills
    assert prefill.turn.kept == (0, 2, 1) and prefill.num_recalled == 20
    prompts = PromptRows.of(plan, None, CPU, 1, of=1, held=Holding([0, 1, 2, 3, 4, 6, 7, 8, 9, 11]))
    scores = torch.arange(prompts.width).flip(0).float()[None]
    rows = select_rows(scores, text_mask(plan, CPU), prompts, [2], plan.stages[1].num_tokens)
    # Four of text, all 20 visual tokens of the first turn, and the marker.
    assert rows.tolist() == [0, 1, 2, 3, 4 + 5, 4 + 10, 24, 25]
