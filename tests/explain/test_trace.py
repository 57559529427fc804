"""What follows from a request's decisions."""

import numpy as np
import pytest

from vllm_reroute.explain.trace import RoutingTrace, TracedDecision, average_kept, stages_of


def trace(*decisions, num_visual=6, layers=(2, 5, 7, 9), scores=None):
    """A trace of a decoder as deep as the last of `layers`; decisions are kept tokens."""
    traced = [
        TracedDecision(
            layer=first,
            end_layer=end,
            kept=np.array(kept),
            scores=None if scores is None else np.array(scores, dtype=np.float32),
        )
        for kept, first, end in zip(decisions, layers, layers[1:], strict=False)
    ]
    return RoutingTrace(num_prompt=20, num_visual=num_visual, decisions=tuple(traced))


def indices(mask):
    return np.flatnonzero(mask).tolist()


def test_stages_defer_and_bring_back():
    stages = stages_of(trace([0, 1, 2], [0, 3], [1, 3, 4]))
    assert [stage.layers for stage in stages] == [(0, 2), (2, 5), (5, 7), (7, 9)]
    assert [indices(stage.kept) for stage in stages] == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2],
        [0, 3],
        [1, 3, 4],
    ]
    assert [indices(stage.deferred) for stage in stages][1:] == [[3, 4, 5], [1, 2, 4, 5], [0, 2, 5]]
    # 1 was deferred by the stage before; 3 and 4 by the first one, and 3 has run since.
    assert [indices(stage.brought_back) for stage in stages] == [[], [], [3], [1, 3, 4]]
    counts = [(s.num_kept, s.num_deferred, s.num_brought_back) for s in stages]
    assert counts == [(6, 0, 0), (3, 3, 0), (2, 4, 1), (3, 3, 3)]


def test_removal_brings_nothing_back():
    assert not any(s.num_brought_back for s in stages_of(trace([0, 1, 2], [0, 2], [2])))


def test_encoder_decides_before_a_dense_stage():
    stages = stages_of(trace([1, 2], [2], layers=(0, 4, 8)))
    assert [stage.layers for stage in stages] == [(0, 4), (4, 8)]


def test_average_counts_layers():
    # 2 layers of 6, 3 of 3, 2 of 2, 2 of 3.
    assert average_kept(trace([0, 1, 2], [0, 3], [1, 3, 4])) == pytest.approx(31 / 9)


def test_ranks():
    of = trace([0, 1], scores=[0.5, 0.9, np.nan, 0.5, 0.1, np.nan])
    dense, stage = stages_of(of)
    assert dense.ranks is None
    assert stage.ranks.tolist() == [2, 1, 0, 3, 4, 0]


def test_equal_scores_rank_in_the_order_of_tokens():
    """Many of them: sorts that mix up equals do so only then."""
    of = trace([0], num_visual=200, scores=[0.5, 0.25] * 100)
    ranks = stages_of(of)[1].ranks
    assert ranks[::2].tolist() == list(range(1, 101))
    assert ranks[1::2].tolist() == list(range(101, 201))
