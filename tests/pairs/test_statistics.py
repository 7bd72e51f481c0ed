"""Choosing, balancing, and the numbers of the report against plain definitions."""

import numpy as np
import pytest

from synpo.judge import Judgement, Scores, Weights
from synpo.pairs.choosing import Choice, Lengths, choose, unbalanced
from synpo.pairs.statistics import Statistics
from synpo.pairs.statistics_page import page


@pytest.mark.parametrize(
    ("totals", "choice"),
    [
        ([3.0, 9.0, 1.0], Choice(1, 2)),
        ([None, 9.0, None, 1.0], Choice(1, 3)),
        ([0.0, 5.0], Choice(1, 0)),  # 0 is a score
        ([5.0, 5.0, 1.0, 1.0], Choice(0, 2)),  # the first of equals
        ([4.0, 4.0], Choice(0, 1)),
        ([None, 4.0], None),
        ([None, None], None),
        ([], None),
    ],
)
def test_the_best_and_the_worst(totals, choice):
    assert choose(totals) == choice


def test_balance_drops_the_most_unequal_of_the_larger_side():
    pairs = [
        Lengths(300, 100, "a"),
        Lengths(120, 100, "b"),
        Lengths(110, 100, "c"),
        Lengths(50, 60, "d"),
        Lengths(5, 5, "e"),
    ]
    assert unbalanced(pairs) == {0, 1}
    assert unbalanced([pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]) == {0, 1}
    assert unbalanced(pairs[2:]) == set()
    assert unbalanced([]) == set()
    assert unbalanced([Lengths(4, 0, "a")]) == {0}


def test_numbers_of_the_report():
    rng = np.random.default_rng(3)
    statistics, weights = Statistics(), Weights()
    points, votes = [], []
    for _ in range(40):
        scores = [Scores(*map(int, rng.integers(0, (6, 6, 4)))) for _ in range(4)]
        scores[0] = scores[0]._replace(fluency=None)
        texts = ["x" * int(rng.integers(10, 90)) for _ in scores]
        totals = [weights.total(s) for s in scores]
        three = [[int(v) for v in rng.integers(0, 4, 4)] for _ in range(2)] + [[None] * 4]
        statistics.judged(texts, Judgement(scores, {"factuality": [], "fluency": [], "consistency": three}), totals)
        statistics.paired(max(totals[1:]) - min(totals[1:]), 30, 20)
        points += [(len(t), s, total) for t, s, total in zip(texts, scores, totals, strict=True)]
        votes += list(zip(*three[:2], strict=True))
    summary = statistics.summary()
    known = [(length, s, total) for length, s, total in points if total is not None]
    expected = np.corrcoef([p[0] for p in known], [p[2] for p in known])[0, 1]
    assert summary["correlation_of_total_and_length"] == pytest.approx(expected, abs=1e-4)
    pair = np.corrcoef([p[1].factuality for p in points], [p[1].consistency for p in points])[0, 1]
    assert summary["correlation_of_criteria"]["factuality, consistency"] == pytest.approx(pair, abs=1e-4)
    assert summary["scores"]["fluency"]["missing"] == 40
    assert sum(summary["totals"].values()) == 120
    assert summary["agreement_of_votes"]["consistency"] == {
        "pairs_of_votes": 160,
        "equal": pytest.approx(np.mean([a == b for a, b in votes]), abs=1e-4),
        "mean_distance": pytest.approx(np.mean([abs(a - b) for a, b in votes]), abs=1e-4),
    }
    assert summary["agreement_of_votes"]["fluency"] == {"pairs_of_votes": 0}
    assert summary["lengths"]["all"] == {
        "pairs": 40, "chosen_longer": 1.0, "chosen_shorter": 0.0, "mean_chosen": 30.0, "mean_rejected": 20.0
    }  # fmt: skip


def test_the_page_shows_names_as_text():
    statistics = Statistics()
    for number in range(60):
        statistics.lose("failed", f"<script>alert({number})</script>: broken")
    shown = page({**statistics.summary(), "settings": {"instruction": "</code><b>"}})
    assert "<script>" not in shown
    assert "</code><b>" not in shown
    assert "&lt;script&gt;alert(49)" in shown
    assert "and 10 more" in shown
