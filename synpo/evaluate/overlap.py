"""Metrics that count the words and n-grams a caption shares with its references: BLEU, ROUGE-L, CIDEr-D.

Each equals pycocoevalcap 1.2 on the same tokens, to rounding, its conventions included. Inputs are tokens: one list
for each caption, and for each caption a list of references. Nothing here is random or approximate.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

Tokens = Sequence[str]
Ngram = tuple[str, ...]

ORDER = 4  # longest n-gram of BLEU and CIDEr
ROUGE_BETA = 1.2  # weight of recall over precision
CIDER_SIGMA = 6.0  # width of CIDEr-D's penalty on differences of length, in tokens
CIDER_SCALE = 10.0


def ngrams(tokens: Tokens, order: int = ORDER) -> Counter[Ngram]:
    """Counts of the n-grams of 1 to `order` tokens."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, order + 1) for i in range(len(tokens) - n + 1))


def bleu_counts(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """What BLEU sums over captions: (captions, 2 + 2 * ORDER) float64.

    Columns: length of the caption; length of the reference nearest to it (the shorter of two as near); n-grams in the
    caption, for n = 1..ORDER; of those, the ones found in a reference, each at most as often as there.
    """
    rows = []
    for tokens, texts in zip(hypotheses, references, strict=True):
        found = ngrams(tokens)
        most: Counter[Ngram] = Counter()
        for text in texts:
            most |= ngrams(text)  # the larger of both counts
        nearest = min((abs(len(text) - len(tokens)), len(text)) for text in texts)[1]
        matched = [0] * ORDER
        for ngram, count in (found & most).items():
            matched[len(ngram) - 1] += count
        rows.append([len(tokens), nearest, *(max(0, len(tokens) - n) for n in range(ORDER)), *matched])
    return np.asarray(rows, dtype=np.float64)


def bleu(counts: np.ndarray) -> np.ndarray:
    """BLEU-1 .. BLEU-ORDER (..., ORDER) of sums of rows of bleu_counts (..., 2 + 2 * ORDER).

    The geometric mean of the shares of matched n-grams, times exp(1 - reference length / length) for what is shorter
    than its references (Papineni et al. 2002). The tiny numbers that keep it defined are pycocoevalcap's.
    """
    length, nearest = counts[..., :1], counts[..., 1:2]
    total, matched = counts[..., 2 : 2 + ORDER], counts[..., 2 + ORDER :]
    precision = (matched + 1e-15) / (total + 1e-9)
    score = np.cumprod(precision, axis=-1) ** (1 / np.arange(1, ORDER + 1))
    ratio = (length + 1e-15) / (nearest + 1e-9)
    return score * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)


def _common_subsequence(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for token in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if token == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """ROUGE-L of each caption (captions,): the F measure, with ROUGE_BETA, of the best precision and the best recall of
    its longest common subsequences with the references (Lin 2004). An empty text counts as one empty token.
    """
    scores = []
    for tokens, texts in zip(hypotheses, references, strict=True):
        own = list(tokens) or [""]
        common = [(_common_subsequence(own, list(text) or [""]), max(1, len(text))) for text in texts]
        precision = max(length for length, _ in common) / len(own)
        recall = max(length / words for length, words in common)
        f = (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision) if precision else 0.0
        scores.append(f)
    return np.asarray(scores)


def cider(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """CIDEr-D of each caption (captions,), 0 to CIDER_SCALE (Vedantam et al. 2015).

    Cosines of tf-idf vectors of 1- to 4-grams against each reference, a caption's counts clipped to the reference's,
    times exp(-difference^2 / (2 CIDER_SIGMA^2)) for lengths counted in bigrams; mean over references and orders. A
    document, for idf, is all references of one video: so a score depends on the whole set, and is 0 for a set of one.
    """
    frequency: Counter[Ngram] = Counter()
    counted = [[ngrams(text) for text in texts] for texts in references]
    for texts in counted:
        frequency.update({ngram for text in texts for ngram in text})
    videos = math.log(len(references)) if references else 0.0

    Vector = tuple[list[dict[Ngram, float]], list[float], int]

    def vector(counts: Counter[Ngram]) -> Vector:
        """By order: the weights, and their norm; the number of bigrams."""
        weights: list[dict[Ngram, float]] = [{} for _ in range(ORDER)]
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * (videos - math.log(max(1, frequency[ngram])))
        norms = [math.sqrt(math.fsum(w * w for w in part.values())) for part in weights]
        return weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    def similarity(own: Vector, other: Vector) -> float:
        total = 0.0
        for mine, theirs, my_norm, their_norm in zip(own[0], other[0], own[1], other[1], strict=True):
            if my_norm and their_norm:
                shared = math.fsum(
                    min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in mine.items() if ngram in theirs
                )
                total += shared / (my_norm * their_norm)
        return total / ORDER * math.exp(-((own[2] - other[2]) ** 2) / (2 * CIDER_SIGMA**2))

    scores = []
    for tokens, texts in zip(hypotheses, counted, strict=True):
        own = vector(ngrams(tokens))
        scores.append(CIDER_SCALE * math.fsum(similarity(own, vector(text)) for text in texts) / len(texts))
    return np.asarray(scores)
