"""From scored candidates to one pair a video, and pairs whose lengths tell nothing."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple


class Choice(NamedTuple):
    """Positions of the chosen and the rejected candidate."""

    chosen: int
    rejected: int


def choose(totals: Sequence[float | None]) -> Choice | None:
    """The best and the worst candidate; a missing score is neither. None: fewer than two candidates have a score.

    Of equal candidates the first is taken.
    """
    known = [index for index, total in enumerate(totals) if total is not None]
    if len(known) < 2:
        return None
    best = max(known, key=lambda index: (totals[index], -index))
    worst = min((index for index in known if index != best), key=lambda index: (totals[index], index))
    return Choice(best, worst)


class Lengths(NamedTuple):
    """Characters of a pair's answers, and a name that is unique among the pairs."""

    chosen: int
    rejected: int
    name: str


def unbalanced(pairs: Sequence[Lengths]) -> set[int]:
    """Positions of the pairs to drop, so that the chosen answer is the longer one as often as it is the shorter one.

    Of the side that has too many, those with the largest ratio of lengths go first: they teach length the most.
    """
    longer = [i for i, pair in enumerate(pairs) if pair.chosen > pair.rejected]
    shorter = [i for i, pair in enumerate(pairs) if pair.chosen < pair.rejected]
    excess = len(longer) - len(shorter)
    side = longer if excess > 0 else shorter

    def bias(index: int) -> tuple[float, bytes]:
        pair = pairs[index]
        low, high = sorted((pair.chosen, pair.rejected))
        return -high / max(low, 1), hashlib.sha256(pair.name.encode()).digest()

    return set(sorted(side, key=bias)[: abs(excess)])
