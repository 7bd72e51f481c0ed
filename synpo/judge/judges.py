"""Judges: something that gives each caption of a question a score, or says that there is none."""

import asyncio
import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple, Protocol

from .answers import Unparsable, parse_scores
from .cache import Answer
from .client import ChatClient, NoAnswer, Request
from .criteria import LAYOUTS, Question, ask


class Verdict(NamedTuple):
    """Scores of a question's captions, in their order.

    Attributes:
        scores: a number on the criterion's scale (a half, where the median of an even number of votes is one), or None:
            missing, which is not 0.
        votes: what each vote gave to the captions; None for a vote that failed.
    """

    scores: tuple[float | None, ...]
    votes: tuple[tuple[int, ...] | None, ...]


class Judge(Protocol):
    """What the stages need of a judge.

    Attributes:
        settings: everything that its scores depend on, for the provenance of results; JSON types only.
        problems: replies without usable scores, by kind.
    """

    settings: dict[str, Any]
    problems: Counter[str]

    async def judge(self, question: Question) -> Verdict:
        """Score the captions. Scores may be missing; errors that no other question would survive are raised."""
        ...

    async def close(self) -> None:
        """Finish what is under way."""
        ...


class ModelJudge:
    """A language model as the judge.

    A reply that cannot be used (see `synpo.judge.answers`), a refusal and an answer that was cut off are asked for
    again, up to `attempts` times in all: with a strict JSON schema first, then in JSON mode, then as plain text. After
    that the vote failed. Scores are missing where no more than half of the votes are left.

    Args:
        client: the model.
        votes: how often a question is asked; the score is the median. Later votes show several captions in a shuffled
            order and carry a seed. Votes about a single caption differ by their seed alone: give a temperature then.
        attempts: replies per vote.
        temperature: of the model.
        layout: "captions-first" or "references-first"; see `synpo.judge.criteria.ask`.
        max_tokens: the longest reply, reasoning included.
    """

    def __init__(
        self,
        client: ChatClient,
        *,
        votes: int = 1,
        attempts: int = 3,
        temperature: float = 0.0,
        layout: str = "captions-first",
        max_tokens: int = 1024,
    ) -> None:
        if votes < 1 or attempts < 1 or max_tokens < 1:
            raise ValueError(f"votes {votes}, attempts {attempts}, max_tokens {max_tokens}: each is at least 1")
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")
        self.client, self.problems = client, Counter()
        self._votes, self._attempts, self._temperature = votes, attempts, temperature
        self._layout, self._max_tokens = layout, max_tokens
        self.settings = {
            "model": client.model,
            "votes": votes,
            "attempts": attempts,
            "temperature": temperature,
            "layout": layout,
            "options": client.options,
            "max_tokens": max_tokens,
        }

    async def judge(self, question: Question) -> Verdict:
        """Raises: ServerError, BudgetReached. A request that fails for itself leaves its scores missing."""
        votes = await asyncio.gather(*(self._vote(question, vote) for vote in range(self._votes)))
        valid = [vote for vote in votes if vote is not None]
        if 2 * len(valid) <= len(votes):
            return Verdict((None,) * len(question.captions), tuple(votes))
        return Verdict(tuple(median(scores) for scores in zip(*valid, strict=True)), tuple(votes))

    async def close(self) -> None:
        await self.client.close()

    async def _vote(self, question: Question, vote: int) -> tuple[int, ...] | None:
        messages, ids = ask(question, vote, self._layout)
        request = Request(
            messages,
            f"{question.criterion.name}/{question.criterion.version}",
            question.criterion.schema(),
            temperature=self._temperature,
            seed=vote or None,
            max_tokens=self._max_tokens,
        )
        for attempt in range(self._attempts):
            try:
                answer = await self.client.answer(request._replace(attempt=attempt))
            except NoAnswer:  # counted by the client
                return None
            try:
                return tuple(parse_scores(_whole_text(answer), ids, question.criterion))
            except Unparsable as error:
                self.problems[error.kind] += 1
        self.problems["no score after all attempts"] += 1
        return None


def _whole_text(answer: Answer) -> str:
    if answer.refusal or answer.finish_reason == "content_filter":
        raise Unparsable("refused")
    if answer.finish_reason == "length":
        raise Unparsable("cut off")
    return answer.text or ""


Oracle = Callable[[Question], Sequence[int | None]]


class OracleJudge:
    """A Python function as the judge: it gets a question and returns one score, or None, per caption.

    Errors: ValueError for a wrong number of scores, or one off the scale.
    """

    def __init__(self, oracle: Oracle, name: str = "oracle") -> None:
        self._oracle, self.problems = oracle, Counter()
        self.settings = {"model": name}

    @classmethod
    def named(cls, name: str) -> "OracleJudge":
        """The function `package.module:function`. Errors: ValueError naming the part that is not there."""
        module, _, function = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"judge {name!r}: {error}; a function is named package.module:function") from None
        return cls(found, name)

    async def judge(self, question: Question) -> Verdict:
        scores = tuple(self._oracle(question))
        scale = question.criterion.scale
        if len(scores) != len(question.captions) or any(s is not None and s not in scale for s in scores):
            raise ValueError(
                f"the oracle gave {scores} for {len(question.captions)} captions under {question.criterion.name}; "
                f"allowed: one of {scale.start} to {scale.stop - 1}, or None, for each"
            )
        self.problems.update(["no score"] * scores.count(None))
        return Verdict(scores, ())

    async def close(self) -> None:
        pass
