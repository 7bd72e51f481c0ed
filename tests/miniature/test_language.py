"""The grammar reads what it writes, and tells language from what is none."""

import re
from random import Random

import pytest

from synpo.miniature.grammar import fact_words, read, tell, words
from synpo.miniature.language import Ngrams, held_out_model, language
from synpo.miniature.world import FACTS, make_scene


def captions(count: int, seed: int) -> list[str]:
    rng = Random(seed)
    return [tell(make_scene(rng).facts, rng) for _ in range(count)]


def test_what_is_written_is_read_back() -> None:
    rng = Random(0)
    vocabulary = set(words())
    lengths, skeletons = set(), set()
    for _ in range(3000):
        facts = make_scene(rng).facts
        caption = tell(facts, rng)
        reading = read(caption)
        assert reading.grammatical
        assert reading.facts == facts
        assert (reading.read, reading.sentences) == (3, 3)
        assert set(caption.replace(",", " ,").replace(".", " .").split()) <= vocabulary
        lengths.add(len(caption.split()))
        skeletons.add(reading.skeleton)
    assert min(lengths) >= 20
    assert max(lengths) <= 30
    assert len(skeletons) > 1500


GOOD = (
    "A red ring moves upwards over a navy background. There is a pink stripe along the left edge. Early on, it grows "
)
GOOD += "larger briefly."


def test_the_example_is_grammatical() -> None:
    assert read(GOOD).grammatical
    assert read(GOOD).facts == {
        "shape": "ring", "colour": "red", "background": "navy", "direction": "up", "edge": "left", "stripe": "pink",
        "event": "grow", "time": "start",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("broken", "facts"),
    [
        ("", 0),
        ("A red ring.", 0),
        (GOOD[:-1], 6),  # no full stop at the end
        (GOOD.replace("There is", "There are"), 6),
        (GOOD.replace("Early", "early"), 6),
        (GOOD.replace(". There", " . There"), 4),
        (GOOD.replace(" moves", "  moves"), 4),
        (GOOD + " " + GOOD.split(". ")[0] + ".", 8),  # a sentence twice
        (GOOD.split(". ")[0] + ".", 4),  # a sentence alone
        ("Early on, it grows larger briefly. " + GOOD.rsplit(". ", 1)[0] + ".", 8),  # an order that is never told
        (GOOD + " Score: 5.", 8),
        ("\n".join(GOOD.split(" ")), 0),
    ],
)
def test_what_is_not_of_the_grammar_is_not_grammatical(broken: str, facts: int) -> None:
    reading = read(broken)
    assert not reading.grammatical
    assert len(reading.facts) == facts


def test_the_first_of_two_tellings_counts() -> None:
    reading = read(GOOD + " A blue cross slides downwards across a white background.")
    assert reading.facts["colour"] == "red"
    assert reading.skeleton.count("<colour 0>") == 2


def test_fact_words_tell_facts() -> None:
    assert {"red", "navy", "ring", "vanishes", "halfway"} <= fact_words()
    assert not {"a", "the", "stripe", "background", "edge", "runs"} & fact_words()
    assert fact_words() <= set(words())


def test_probabilities_sum_to_one() -> None:
    model = Ngrams(captions(50, 1))
    vocabulary = [*words(), "</s>"]
    known = [word for word in vocabulary if model.probability((), word) > 1 / 1000]
    for history in [(), ("A",), ("<s>", "<s>"), ("red", "nonsense"), ("a", "red")]:
        seen = {word for word in vocabulary if model._counts[(word,)]}
        total = sum(model.probability(history, word) for word in seen)
        # what is left is for one word that was never seen
        assert total + model.probability(history, "nonsense") == pytest.approx(1)
    assert known


def test_language_falls_with_what_spoils_it() -> None:
    good = captions(200, 3)
    rng = Random(0)
    shuffled = []
    for caption in good:
        pieces = caption.split()
        rng.shuffle(pieces)
        shuffled.append(" ".join(pieces))
    whole, broken, same = language(good), language(shuffled), language([good[0]] * 200)
    assert whole.grammatical == 1
    assert broken.grammatical == 0
    assert whole.perplexity < 5 < 20 < broken.perplexity
    assert same.diversity == pytest.approx(1 / 200)
    assert whole.diversity > 0.8
    assert 20 <= whole.words <= 30
    with pytest.raises(ValueError, match="there is no caption"):
        language([])


def test_the_held_out_model_knows_every_word() -> None:
    model = held_out_model()
    assert all(model._counts[(word,)] for word in words())
    assert len(FACTS) == 8


def test_no_word_tells_a_fact_before_it_is_known_of_what() -> None:
    """Such as the red in "A red", if a red ring and a red stripe could both follow."""
    facts: dict[str, set[str]] = {}
    for caption in captions(3000, 5):
        for sentence in re.findall(r"[^.]+\.", caption):
            skeleton = read(sentence.strip()).skeleton
            start = skeleton.index("<")
            words = sentence.strip().lower()
            beginning = words[:start] + words[start:].split()[0]
            facts.setdefault(beginning, set()).add(skeleton[start + 1 :].split()[0])
    assert len(facts) > 20
    assert all(len(names) == 1 for names in facts.values()), facts
