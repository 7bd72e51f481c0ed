"""A judge that knows: factuality, fluency and consistency of captions of the small world, read off what they tell.

As a function, `--judge python:synpo.miniature.oracle:judge`, it knows the truth by the film. Asked in words, as a
server is (synpo.miniature.server), it takes the references for the truth, as the question says.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from ..judge import Question
from .films import truth_of
from .grammar import read
from .world import FACTS

Facts = Mapping[str, str]


def accuracy(caption: str, truth: Facts) -> float:
    """Share of the eight facts that a caption tells right, 0..1; what it leaves out counts as wrong."""
    told = read(caption).facts
    return sum(told.get(name) == truth[name] for name in FACTS) / len(FACTS)


def factuality(caption: str, truth: Facts) -> int:
    """0..5: one off for each fact that is told wrong; a caption that tells nothing has 0, one that leaves facts out at
    most their share.
    """
    told = read(caption).facts
    wrong = sum(value != truth[name] for name, value in told.items())
    return min(max(0, 5 - wrong), round(5 * len(told) / len(FACTS)))


def fluency(caption: str) -> int:
    """0..5: 5 for a caption of the grammar; else 4 at most, by the share of its sentences that belong to one."""
    reading = read(caption)
    return 5 if reading.grammatical else round(4 * reading.read / max(3, reading.sentences))


def common_facts(captions: Sequence[str]) -> dict[str, str]:
    """What most captions tell; of two values told as often, the first told."""
    told: dict[str, Counter[str]] = {name: Counter() for name in FACTS}
    for caption in captions:
        for name, value in read(caption).facts.items():
            told[name][value] += 1
    return {name: votes.most_common(1)[0][0] for name, votes in told.items() if votes}


def consistency(captions: Sequence[str]) -> list[int]:
    """0..3 for each caption: 3 when all that it tells is what most of the captions tell, one off for every two facts
    that are not.
    """
    common = common_facts(captions)
    scores = []
    for caption in captions:
        told = read(caption).facts
        apart = sum(told.get(name) != value for name, value in common.items())
        scores.append(max(0, 3 - (apart + 1) // 2) if told else 0)
    return scores


def rate(criterion: str, captions: Sequence[str], truth: Facts | None) -> list[int]:
    """Scores of captions under a criterion of synpo.judge by its name; truth is needed for factuality alone.

    Errors: ValueError for another criterion.
    """
    if criterion == "factuality":
        return [factuality(caption, truth or {}) for caption in captions]
    if criterion == "fluency":
        return [fluency(caption) for caption in captions]
    if criterion == "consistency":
        return consistency(captions)
    raise ValueError(f"criterion {criterion!r} is not known to the oracle; it knows factuality, fluency, consistency")


def judge(question: Question) -> list[int]:
    """What synpo.judge's OracleJudge calls. The film has its truth beside it; see synpo.miniature.films."""
    name = question.criterion.name
    return rate(name, question.captions, truth_of(question.video) if name == "factuality" else None)
