"""Attention shares and ranks, as the plot of where the model looks shows them."""

import numpy as np
import pytest

from benchmarks.grounding.where_it_looks import summarise

ATTENTION = np.array([[0.1, 0.4, 0.2, 0.05], [0.3, 0.0, 0.1, 0.6]])


def test_shares_and_ranks_per_layer():
    """The target has two tokens; the better one counts, rank 1 being the most attended."""
    subject, target = np.array([0, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    found = [{"attention": ATTENTION, "subject": subject, "target": target}]
    summary = summarise(found, ["beside"])
    assert summary["subject"]["attention"] == pytest.approx([0.4, 0])
    assert summary["target"]["attention"] == pytest.approx([0.3, 0.4])
    assert [ranks[1] for ranks in summary["subject"]["best_rank"]] == [1, 4]
    assert [ranks[1] for ranks in summary["target"]["best_rank"]] == [2, 2]
