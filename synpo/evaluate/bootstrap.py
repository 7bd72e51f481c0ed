"""Changes and their confidence intervals: the same items measured twice, drawn again with replacement."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

_ENTRIES = 10_000_000  # of a table of draws at a time: 80 MB

OfSums = Callable[[np.ndarray, np.ndarray], np.ndarray]  # sums (..., K) of items' parts, number of items (...)


class Change(NamedTuple):
    """A mean change with the ends of its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def _draws(items: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """`resamples` choices of `items` out of as many, with replacement, as (some, items) tables of indices."""
    generator = np.random.default_rng(seed)
    step = max(1, _ENTRIES // items)
    for start in range(0, resamples, step):
        yield generator.integers(items, size=(min(step, resamples - start), items))


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> Change:
    """Percentile bootstrap of mean(after - before) over pairs, 95 %: pairs are drawn with replacement, each with both
    its values.

    Errors: ValueError for different lengths, no pair, or a value that is not finite (position named).
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(
            f"before has {len(before)} values and after {len(after)}; the same pairs, at least one, are needed in both"
        )
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(difference))
    if bad.size:
        raise ValueError(f"pair {bad[0]}: before {before[bad[0]]}, after {after[bad[0]]}; finite values are needed")
    means = [difference[drawn].mean(1) for drawn in _draws(len(difference), resamples, seed)]
    return Change(math.fsum(difference) / len(difference), *_interval(np.concatenate(means)))


def paired_bootstrap_of_sums(
    before: np.ndarray, after: np.ndarray, of_sums: OfSums, *, resamples: int = 2_000, seed: int = 0
) -> Change:
    """The same for what is no mean, such as BLEU: of_sums makes it from parts (items, K) summed over the items drawn.

    Change.mean is the change over all items. Errors: ValueError for tables of different shapes, or without an item.
    """
    if before.shape != after.shape or before.ndim != 2 or not len(before):
        raise ValueError(f"before has shape {before.shape}, after {after.shape}; (items, parts) is needed, the same")
    items = len(before)
    changes = []
    for drawn in _draws(items, resamples, seed):
        offsets = np.arange(len(drawn))[:, None] * items
        often = np.bincount((drawn + offsets).ravel(), minlength=len(drawn) * items).reshape(len(drawn), items)
        count = np.full(len(drawn), items)
        changes.append(of_sums(often @ after, count) - of_sums(often @ before, count))
    whole = of_sums(after.sum(0), np.asarray(items)) - of_sums(before.sum(0), np.asarray(items))
    return Change(float(whole), *_interval(np.concatenate(changes)))
