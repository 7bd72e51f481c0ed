"""Intervals of changes."""

from typing import Any

import numpy as np
import pytest

from synpo.evaluate.bootstrap import paired_bootstrap, paired_bootstrap_of_sums


def test_bootstrap_interval_is_the_normal_one_for_many_pairs() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(size=4000)
    after = before + generator.normal(0.1, 0.5, size=4000)
    change = paired_bootstrap(before, after)
    difference = after - before
    half = 1.96 * difference.std() / np.sqrt(4000)
    assert change.mean == pytest.approx(difference.mean())
    # The end points of 10,000 resamples wander by about sqrt(.025 * .975 / 10000) / density, 2 % of the half width.
    assert change.low == pytest.approx(change.mean - half, abs=0.1 * half)
    assert change.high == pytest.approx(change.mean + half, abs=0.1 * half)
    assert paired_bootstrap(before, after) == change


def test_bootstrap_pairs_the_values() -> None:
    before = np.linspace(-100, 100, 50)
    change = paired_bootstrap(before, before + 1)
    assert change == pytest.approx((1, 1, 1))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([1.0], [1.0, 2.0], "before has 1 values and after 2"),
        ([], [], "before has 0 values"),
        ([1.0, 2.0], [1.0, float("nan")], "pair 1: before 2.0, after nan"),
    ],
)
def test_bootstrap_refuses(before: Any, after: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(before, after)


def test_of_sums_agrees_with_the_mean_where_it_is_one() -> None:
    generator = np.random.default_rng(1)
    before, after = generator.normal(size=(2, 300))
    expected = paired_bootstrap(before, after, resamples=2000)
    got = paired_bootstrap_of_sums(before[:, None], after[:, None], lambda sums, count: sums[..., 0] / count)
    assert got == pytest.approx(expected, abs=1e-12)


def test_of_sums_is_no_mean_of_ratios() -> None:
    # a ratio of sums: long items count for more
    before = np.array([[0.0, 1.0], [0.0, 9.0]])
    after = np.array([[1.0, 1.0], [0.0, 9.0]])
    change = paired_bootstrap_of_sums(before, after, lambda sums, count: sums[..., 0] / sums[..., 1])
    assert change == pytest.approx((0.1, 0.0, 1.0))


def test_of_sums_refuses_different_items() -> None:
    with pytest.raises(ValueError, match=r"before has shape \(2, 1\), after \(3, 1\)"):
        paired_bootstrap_of_sums(np.zeros((2, 1)), np.zeros((3, 1)), lambda sums, count: sums[..., 0])
