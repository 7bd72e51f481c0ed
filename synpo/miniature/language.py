"""How well captions of the small world are written: grammatical, likely, and not always the same."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import NamedTuple

from .grammar import read, tell
from .world import make_scene

ORDER = 3
TRAINING_CAPTIONS, TRAINING_SEED = 4000, 20_260_101  # of the n-gram model; no film of a demo or test has this seed


class Ngrams:
    """An interpolated 3-gram model over words and marks, after Witten and Bell (1991)."""

    def __init__(self, captions: Sequence[str]) -> None:
        self._counts: Counter[tuple[str, ...]] = Counter()
        self._followers: Counter[tuple[str, ...]] = Counter()  # kinds of words after a history
        self._totals: Counter[tuple[str, ...]] = Counter()
        for caption in captions:
            tokens = _tokens(caption)
            for place in range(ORDER - 1, len(tokens)):
                for length in range(ORDER):
                    history, word = tuple(tokens[place - length : place]), tokens[place]
                    self._totals[history] += 1
                    self._counts[(*history, word)] += 1
                    self._followers[history] += self._counts[(*history, word)] == 1
        self._words = self._followers[()] + 1  # and one that was never seen

    def probability(self, history: tuple[str, ...], word: str) -> float:
        """P(word | history), above 0 for every word."""
        shorter = self.probability(history[1:], word) if history else 1 / self._words
        kinds, total = self._followers[history], self._totals[history]
        if not total:
            return shorter
        return (self._counts[(*history, word)] + kinds * shorter) / (total + kinds)

    def perplexity(self, captions: Sequence[str]) -> float:
        """exp of the mean negative log-probability of a word, over all words and ends. ValueError for no caption."""
        if not captions:
            raise ValueError("there is no caption to take the perplexity of")
        logs = []
        for caption in captions:
            tokens = _tokens(caption)
            for place in range(ORDER - 1, len(tokens)):
                logs.append(math.log(self.probability(tuple(tokens[place - ORDER + 1 : place]), tokens[place])))
        return math.exp(-math.fsum(logs) / len(logs))


def _tokens(caption: str) -> list[str]:
    return ["<s>"] * (ORDER - 1) + caption.replace(",", " ,").replace(".", " .").split() + ["</s>"]


@cache
def held_out_model() -> Ngrams:
    """The model of captions that the grammar tells of films nobody else sees."""
    rng = Random(TRAINING_SEED)
    return Ngrams([tell(make_scene(rng).facts, rng) for _ in range(TRAINING_CAPTIONS)])


class Language(NamedTuple):
    """Quality of a set of captions as language.

    grammatical: share that the grammar's parser takes. perplexity: under held_out_model. diversity: effective number of
    phrasings (exp of the entropy of skeletons), as a share of the number of captions. words: mean length.
    """

    grammatical: float
    perplexity: float
    diversity: float
    words: float


def language(captions: Sequence[str]) -> Language:
    """Errors: ValueError for no caption."""
    perplexity = held_out_model().perplexity(captions)
    readings = [read(caption) for caption in captions]
    shares = [count / len(captions) for count in Counter(reading.skeleton for reading in readings).values()]
    entropy = -math.fsum(share * math.log(share) for share in shares)
    return Language(
        sum(reading.grammatical for reading in readings) / len(captions),
        perplexity,
        math.exp(entropy) / len(captions),
        sum(len(caption.split()) for caption in captions) / len(captions),
    )
