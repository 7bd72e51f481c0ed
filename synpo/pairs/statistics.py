"""What became of the videos on the way to pairs: counts, histograms, biases, in memory that does not grow."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from ..judge import Judgement, Scores

_NAMED = 50  # videos named for each kind of loss


@dataclass
class Correlation:
    """Pearson's correlation of a stream of points."""

    n: int = 0
    sums: tuple[float, ...] = (0.0,) * 5

    def add(self, x: float, y: float) -> None:
        self.n += 1
        self.sums = tuple(s + v for s, v in zip(self.sums, (x, y, x * x, y * y, x * y), strict=True))

    @property
    def value(self) -> float | None:
        """None for fewer than two points, or where one side does not vary."""
        x, y, xx, yy, xy = self.sums
        spread = (self.n * xx - x * x) * (self.n * yy - y * y)
        return None if self.n < 2 or spread <= 1e-9 else round((self.n * xy - x * y) / math.sqrt(spread), 4)


@dataclass
class Agreement:
    """How far pairs of votes about the same caption agree."""

    pairs: int = 0
    equal: int = 0
    distance: int = 0

    def add(self, votes: Sequence[int]) -> None:
        for a, b in combinations(votes, 2):
            self.pairs += 1
            self.equal += a == b
            self.distance += abs(a - b)

    def summary(self) -> dict[str, Any]:
        """Share of equal votes and mean distance, over pairs of votes."""
        if not self.pairs:
            return {"pairs_of_votes": 0}
        equal, distance = self.equal / self.pairs, self.distance / self.pairs
        return {"pairs_of_votes": self.pairs, "equal": round(equal, 4), "mean_distance": round(distance, 4)}


@dataclass
class Lost:
    """Videos that gave no pair for one reason: their number, and the first of them with what happened."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(name)


class Statistics:
    """Counts of a run; `summary` gives them as JSON types."""

    def __init__(self) -> None:
        self.videos = 0
        self.pairs = 0
        self.lost: dict[str, Lost] = {}  # reason -> videos, in the order of the stages
        self.candidates = Counter[str]()
        self.scores = {name: Counter[float | None]() for name in Scores._fields}
        self.totals, self.gaps = Counter[float](), Counter[float]()
        self.agreement = {name: Agreement() for name in Scores._fields}
        self.between = {names: Correlation() for names in combinations(Scores._fields, 2)}
        self.score_and_length = Correlation()
        self.lengths = {"all": LengthBias(), "kept": LengthBias()}

    def lose(self, reason: str, name: str) -> None:
        """A video that gives no pair. name: the video, with what happened to it where that is known."""
        self.lost.setdefault(reason, Lost()).add(name)

    def judged(self, texts: Sequence[str], judgement: Judgement, totals: Sequence[float | None]) -> None:
        """The candidates of one video with their scores."""
        for text, scores, total in zip(texts, judgement.scores, totals, strict=True):
            self.candidates["judged"] += 1
            self.candidates["with a missing score"] += total is None
            for name, score in zip(Scores._fields, scores, strict=True):
                self.scores[name][score] += 1
            for (a, b), correlation in self.between.items():
                if (x := getattr(scores, a)) is not None and (y := getattr(scores, b)) is not None:
                    correlation.add(x, y)
            if total is not None:
                self.totals[math.floor(total * 2) / 2] += 1
                self.score_and_length.add(len(text), total)
        for name, votes in judgement.votes.items():
            for of_caption in zip(*votes, strict=True):
                self.agreement[name].add([vote for vote in of_caption if vote is not None])

    def paired(self, gap: float, chosen: int, rejected: int) -> None:
        """Best and worst candidate of a video, before any filter. Lengths in characters."""
        self.gaps[math.floor(gap * 2) / 2] += 1
        self.lengths["all"].add(chosen, rejected)

    def kept(self, chosen: int, rejected: int) -> None:
        """A pair that is written."""
        self.pairs += 1
        self.lengths["kept"].add(chosen, rejected)

    def summary(self) -> dict[str, Any]:
        """Everything as JSON types. Bins of totals and gaps are half a point wide, named by their lower edge."""
        return {
            "videos": self.videos,
            "pairs": self.pairs,
            "lost": {reason: vars(lost) for reason, lost in self.lost.items()},
            "candidates": dict(self.candidates),
            "scores": {name: _histogram(counts) for name, counts in self.scores.items()},
            "totals": _histogram(self.totals),
            "gaps": _histogram(self.gaps),
            "lengths": {name: bias.summary() for name, bias in self.lengths.items()},
            "correlation_of_total_and_length": self.score_and_length.value,
            "correlation_of_criteria": {f"{a}, {b}": c.value for (a, b), c in self.between.items()},
            "agreement_of_votes": {name: agreement.summary() for name, agreement in self.agreement.items()},
        }


@dataclass
class LengthBias:
    """Whether the chosen answer is mostly the longer one."""

    pairs: int = 0
    longer: int = 0
    shorter: int = 0
    chosen: int = 0
    rejected: int = 0

    def add(self, chosen: int, rejected: int) -> None:
        self.pairs += 1
        self.longer += chosen > rejected
        self.shorter += chosen < rejected
        self.chosen += chosen
        self.rejected += rejected

    def summary(self) -> dict[str, Any]:
        if not self.pairs:
            return {"pairs": 0}
        return {
            "pairs": self.pairs,
            "chosen_longer": round(self.longer / self.pairs, 4),
            "chosen_shorter": round(self.shorter / self.pairs, 4),
            "mean_chosen": round(self.chosen / self.pairs, 1),
            "mean_rejected": round(self.rejected / self.pairs, 1),
        }


def _histogram(counts: Mapping[float | None, int]) -> dict[str, int]:
    """Values as text, rising; "missing" last."""
    known = sorted(value for value in counts if value is not None)
    missing = {"missing": counts[None]} if counts.get(None) else {}
    return {f"{value:g}": counts[value] for value in known} | missing
