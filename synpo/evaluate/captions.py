"""caption_metrics: a set of captions against their references, in the numbers that papers print."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .meteor import Meteor, find
from .overlap import ORDER, bleu, bleu_counts, cider, rouge_l
from .ptb import tokenize

BLEU = tuple(f"BLEU-{n}" for n in range(1, ORDER + 1))


class Metric(NamedTuple):
    """One metric on one set of captions, in a form that can be resampled.

    value: of the whole set. parts (captions, K) and of_sums: the metric of any choice of captions is of_sums of the sum
    of their parts and of their number; of_sums takes (..., K) and (...,). each: of single captions, where it has such.
    """

    value: float
    parts: np.ndarray
    of_sums: Callable[[np.ndarray, np.ndarray], np.ndarray]
    each: np.ndarray | None


def _mean(values: np.ndarray) -> Metric:
    def of_sums(sums: np.ndarray, count: np.ndarray) -> np.ndarray:
        return sums[..., 0] / count

    return Metric(float(np.mean(values)), values[:, None], of_sums, values)


def _bleu(counts: np.ndarray, n: int) -> Metric:
    def of_sums(sums: np.ndarray, count: np.ndarray) -> np.ndarray:
        return bleu(sums)[..., n - 1]

    return Metric(float(bleu(counts.sum(0))[n - 1]), counts, of_sums, bleu(counts)[:, n - 1])


def check(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    """Errors: ValueError or TypeError naming the first video whose caption or references are not as they must be."""
    if not hypotheses:
        raise ValueError("hypotheses is empty; at least one caption is needed")
    for name, missing in (
        ("references", [video for video in hypotheses if video not in references]),
        ("hypotheses", [video for video in references if video not in hypotheses]),
    ):
        if missing:
            raise ValueError(
                f"{name} has nothing for {len(missing)} of the videos, the first is {missing[0]!r}; both need the same"
            )
    for video, texts in references.items():
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise TypeError(f"references[{video!r}] is a {type(texts).__name__}; a list of strings is needed")
        if not texts:
            raise ValueError(f"references[{video!r}] is empty; at least one reference is needed")
        for number, text in enumerate((hypotheses[video], *texts)):
            if not isinstance(text, str):
                where = f"references[{video!r}][{number - 1}]" if number else f"hypotheses[{video!r}]"
                raise TypeError(f"{where} is a {type(text).__name__}; a string is needed")


def measure(
    hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]], meteor: bool | None = None
) -> dict[str, Metric]:
    """The metrics by name, captions in the order of `references`. See caption_metrics."""
    check(hypotheses, references)
    texts = [[tokenize(text) for text in references[video]] for video in references]
    own = [tokenize(hypotheses[video]) for video in references]
    counts = bleu_counts(own, texts)
    found = {name: _bleu(counts, n) for n, name in enumerate(BLEU, start=1)}
    found["ROUGE-L"] = _mean(rouge_l(own, texts))
    found["CIDEr"] = _mean(cider(own, texts))
    if meteor or (meteor is None and find().missing is None):
        with Meteor() as program:
            whole, each = program.scores(own, texts)
        # resampling takes the mean over captions; the set's own score weighs long captions more
        found["METEOR"] = _mean(np.asarray(each))._replace(value=whole)
    return found


def caption_metrics(
    hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]], *, meteor: bool | None = None
) -> dict[str, float]:
    """BLEU-1 to BLEU-4, ROUGE-L, CIDEr and, where it can run, METEOR of a set of captions.

    hypotheses: video -> its caption. references: the same videos -> their references, at least one each.
    Values equal pycocoevalcap's: BLEU, ROUGE-L and METEOR in 0..1, CIDEr (it is CIDEr-D) in 0..10 with idf from these
    references; papers print all of them times 100, so CIDEr up to 1000.
    meteor: None takes it along where Java and pycocoevalcap's jar are; True insists on it; False leaves it out.

    Errors: ValueError for videos that are not the same on both sides, or without a reference; TypeError for what is not
    a string; RuntimeError where METEOR is insisted on and cannot run.
    """
    return {name: metric.value for name, metric in measure(hypotheses, references, meteor).items()}
