"""Scores and choice on the device equal what a reader would do by hand, request by request."""

import numpy as np
import pytest
import torch

from vllm_reroute.plan.step_plan import RequestRouting, plan_step
from vllm_reroute.plan.visual_spans import VisualSpans
from vllm_reroute.routing.prompt_rows import PromptRows, visual_mask
from vllm_reroute.routing.scorers.attention import last_prompt_row
from vllm_reroute.routing.selection import select_rows

CPU = torch.device("cpu")
RATIOS = (1.0, 0.5, 0.2)
ONE = VisualSpans((4,), (24,))
TWO = VisualSpans((1, 12), (9, 20))
START = VisualSpans((0,), (7,))

# spans, prompt tokens, computed before, scheduled now
IMAGE = (ONE, 30, 0, 30)
IMAGES = (TWO, 25, 0, 25)
RESUMED = (START, 9, 0, 15)
TEXT = (None, 40, 8, 12)
DECODE = (ONE, 30, 44, 1)


class Step:
    """A planned batch in the layout of all its tokens."""

    def __init__(self, *batch):
        self.batch = batch
        routings = [
            RequestRouting.of(spans, range(num_prompt), RATIOS) for spans, num_prompt, *_ in batch
        ]
        computed, scheduled = (np.array([r[i] for r in batch]) for i in (2, 3))
        self.plan = plan_step(computed, scheduled, routings, RATIOS)
        self.prompts = PromptRows.of(self.plan, None, CPU)
        self.visual = visual_mask(self.plan, CPU)

    def select(self, scores, ratio_index, visual=None):
        num_kept = [p.routing.num_kept(ratio_index) for p in self.plan.prefills]
        num_selected = self.plan.lengths[RATIOS[ratio_index]].num_tokens
        visual = self.visual if visual is None else visual
        return select_rows(scores, visual, self.prompts, num_kept, num_selected).tolist()

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

    def by_hand(self, per_request, ratio_index):
        """Rows that run: text and decodes, and of each prompt the best visual tokens, in order."""
        rows = [row for row in range(self.plan.num_tokens) if not self.visual[row]]
        for prefill, scores in zip(self.plan.prefills, per_request, strict=True):
            spans = prefill.routing.spans
            places = [
                p
                for start, end in zip(spans.starts, spans.ends, strict=True)
                for p in range(start, end)
            ]
            best = sorted(places, key=lambda p: (-float(scores[p]), p))
            rows += [prefill.start + p for p in best[: prefill.routing.num_kept(ratio_index)]]
        return sorted(rows)


BATCHES = {
    "one image": (IMAGE,),
    "two images in a prompt": (IMAGES,),
    "resumed": (RESUMED,),
    "image requests of different lengths": (IMAGES, IMAGE, RESUMED),
    "mixed": (TEXT, IMAGE, DECODE, DECODE, IMAGES, TEXT, RESUMED),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("ratio_index", [0, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_run_in_order(batch, ratio_index, seed):
    step = Step(*batch)
    scores = step.random_scores(seed)
    selected = step.select(step.table(scores), ratio_index)
    assert selected == step.by_hand(scores, ratio_index)
    assert len(selected) == step.plan.lengths[RATIOS[ratio_index]].num_tokens


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
    text = [row for row in range(step.plan.num_tokens) if not step.visual[row]]
    assert set(text) <= set(step.select(step.table(scores), 2))


def test_text_takes_no_place_of_a_visual_token():
    step = Step(IMAGE)
    scores = torch.arange(30.0).flip(0)  # the text before the image scores highest
    assert step.select(step.table([scores]), 2) == [0, 1, 2, 3, 4, 5, 6, 7, *range(24, 30)]


@pytest.mark.parametrize("ratio_index", [1, 2])
def test_a_choice_does_not_depend_on_the_batch(ratio_index):
    alone, together = Step(IMAGES), Step(TEXT, IMAGE, IMAGES, DECODE, RESUMED)
    scores = together.random_scores(seed=7)
    own = alone.select(alone.table([scores[1]]), ratio_index)
    start = together.plan.prefills[1].start
    rows = together.select(together.table(scores), ratio_index)
    assert [row - start for row in rows if start <= row < start + 25] == own


def test_only_candidates_are_chosen_from():
    """`remove`: what an earlier stage dropped is no row of the layout; here, no candidate."""
    step = Step(IMAGE)
    candidates = step.visual.clone()
    candidates[4:14] = False  # ten visual rows left to choose from, the others count as text
    scores = torch.arange(30.0).flip(0)
    rows = select_rows(step.table([scores]), candidates, step.prompts, [4], 24)
    assert rows.tolist() == [*range(14), *range(14, 18), *range(24, 30)]


def test_prompt_rows_of_a_mixed_step():
    step = Step(TEXT, IMAGE, DECODE, RESUMED)
    prompts = step.prompts
    assert prompts.lens == (30, 9)
    assert prompts.rows.tolist() == [*range(12, 42), *range(43, 52)], (
        "the 6 resumed tokens are no prompt"
    )
    assert prompts.last.tolist() == [41, 51]
    assert prompts.slots.tolist() == [*range(30), *range(30, 39)]
    assert step.visual.nonzero().flatten().tolist() == [*range(16, 36), *range(43, 50)]
    compact = PromptRows.of(step.plan, 0.2, CPU)
    assert compact.lens == (14, 3) and compact.num_rows == 12 + 14 + 1 + 9
    assert compact.rows.tolist() == [*range(12, 26), *range(27, 30)]
    assert compact.last.tolist() == [25, 29]


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_last_prompt_row_is_a_row_of_softmax_attention(heads, kv_heads, dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(heads, 16, generator=generator).to(dtype)
    keys = torch.randn(11, kv_heads, 16, generator=generator).to(dtype)
    scale = 16**-0.5
    expect = torch.zeros(11)
    for head in range(heads):
        own = keys[:, head * kv_heads // heads].float()
        expect += torch.softmax(own @ query[head].float() * scale, dim=0)
    row = last_prompt_row(query, keys, scale)
    assert row.dtype == torch.float32
    torch.testing.assert_close(row, expect, rtol=1e-5, atol=1e-6)
    assert float(row.sum()) == pytest.approx(heads, rel=1e-5)


def test_last_prompt_row_agrees_with_torch_s_attention():
    generator = torch.Generator().manual_seed(1)
    query, keys = (
        torch.randn(8, 32, generator=generator),
        torch.randn(9, 2, 32, generator=generator),
    )
    one_hot = torch.eye(9).expand(8, 9, 9)
    probabilities = torch.nn.functional.scaled_dot_product_attention(
        query.unsqueeze(1), keys.permute(1, 0, 2).repeat_interleave(4, dim=0), one_hot
    )
    torch.testing.assert_close(
        last_prompt_row(query, keys, 32**-0.5), probabilities.sum(dim=(0, 1))
    )
