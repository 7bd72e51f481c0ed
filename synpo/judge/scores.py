"""All captions of one video under the three criteria, and one number from three."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .criteria import CONSISTENCY, FACTUALITY, FLUENCY, Criterion, Question
from .judges import Judge, Verdict


class Scores(NamedTuple):
    """One candidate's scores; None where the judge gave none."""

    factuality: float | None
    fluency: float | None
    consistency: float | None


@dataclass(frozen=True)
class Weights:
    """Weights of the three criteria; the defaults are the published ones. Errors: ValueError for a negative one."""

    factuality: float = 1.1
    fluency: float = 1.0
    consistency: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"the weight of {name} is {value}; a number of at least 0 is needed")

    def total(self, scores: Scores) -> float | None:
        """The weighted sum; None, never a partial sum, where a score is missing.

        Rounded to 1e-6: candidates of equal scores have equal totals, and a gap of 4 is not 3.9999999999999996.
        """
        if None in scores:
            return None
        return round(sum(getattr(self, name) * getattr(scores, name) for name in scores._fields), 6)


class Judgement(NamedTuple):
    """The scores of a video's candidates, in their order, and the votes behind them by criterion.

    votes[criterion][vote][candidate] is a number or None.
    """

    scores: list[Scores]
    votes: dict[str, list[list[int | None]]]


async def judge_candidates(
    judge: Judge, instruction: str, candidates: Sequence[str], references: Sequence[str], video: str = ""
) -> Judgement:
    """Score the candidates: factuality against the references and fluency one by one, consistency all in one call.

    A single candidate agrees with nobody: its consistency is missing. Raises: what the judge raises.
    """

    async def one_by_one(criterion: Criterion, references: tuple[str, ...]) -> Verdict:
        asked = (Question(criterion, instruction, (text,), references, video) for text in candidates)
        verdicts = await asyncio.gather(*(judge.judge(question) for question in asked))
        votes = [[vote and vote[0] for vote in verdict.votes] for verdict in verdicts]  # by candidate, then vote
        return Verdict(tuple(v.scores[0] for v in verdicts), tuple(zip(*votes, strict=True)))

    async def together() -> Verdict:
        if len(candidates) < 2:
            return Verdict((None,) * len(candidates), ())
        return await judge.judge(Question(CONSISTENCY, instruction, tuple(candidates), (), video))

    given = await asyncio.gather(one_by_one(FACTUALITY, tuple(references)), one_by_one(FLUENCY, ()), together())
    scores = [Scores(*three) for three in zip(*(verdict.scores for verdict in given), strict=True)]
    votes = {
        name: [list(vote) if vote is not None else [None] * len(candidates) for vote in verdict.votes]
        for name, verdict in zip(Scores._fields, given, strict=True)
    }
    return Judgement(scores, votes)
