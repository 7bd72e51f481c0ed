"""The language of the small world: every caption is three sentences of 21 to 30 words in all, phrased in many ways,
and a parser reads the facts back.

The wording of facts and the sentences stand as data, from which both directions are made, so that what is written can
be read. A caption is grammatical when it is one that `tell` can write, facts of any values. No two kinds of sentences
share their words up to the first fact: a writer who has begun with "A red" should not still have to choose of what.
"""

import itertools
import re
from collections.abc import Mapping
from random import Random
from typing import NamedTuple

from .world import FACTS

# {name} is a fact in one of its wordings, [a|b] a choice; commas are words of their own to neither side
_SENTENCES = {
    "motion": (
        "a {colour} {shape} [moves|slides|drifts] {direction} [across|over] a {background} background",
        "on a {background} background, a {colour} {shape} [moves|slides|drifts] {direction}",
    ),
    "stripe": (
        "there is a {stripe} stripe along the {edge} edge",
        "the {edge} [edge|side] has a {stripe} stripe",
        "along the {edge} [edge|side] runs a {stripe} stripe",
    ),
    "event": (
        "{time}, {event} [briefly|for a moment]",
        "{event} [briefly|for a moment] {time}",
    ),
}
_WORDINGS = {
    "direction": {
        "left": ("to the left", "leftwards"),
        "right": ("to the right", "rightwards"),
        "up": ("to the top", "upwards"),
        "down": ("to the bottom", "downwards"),
    },
    "event": {
        "vanish": ("the shape vanishes", "it disappears"),
        "grow": ("the shape swells", "it grows larger"),
        "dark": ("the lights go out", "the view turns dark"),
        "flash": ("light fills the view", "everything lights up"),
    },
    "time": {
        "start": ("near the start", "early on"),
        "middle": ("around the middle", "halfway through"),
        "end": ("near the end", "late on"),
    },
}
_ORDERS = (("motion", "stripe", "event"), ("motion", "event", "stripe"), ("stripe", "motion", "event"))
_CHOICE = re.compile(r"\[([^]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


def _wordings(fact: str) -> dict[str, str]:
    """Every wording of a fact, and the value that it stands for."""
    told = _WORDINGS.get(fact, {value: (value,) for value in FACTS[fact]})
    return {wording: value for value, wordings in told.items() for wording in wordings}


_VALUES = {fact: _wordings(fact) for fact in FACTS}


def _pattern(template: str) -> str:
    """A regular expression of every sentence that a template stands for, with a group for each fact."""
    parts = re.split(r"(\[[^]]*\]|\{\w+\})", template)
    out = []
    for part in parts:
        if part.startswith("["):
            out.append("(?:" + "|".join(map(re.escape, part[1:-1].split("|"))) + ")")
        elif part.startswith("{"):
            fact = part[1:-1]
            out.append(f"(?P<{fact}>" + "|".join(map(re.escape, _VALUES[fact])) + ")")
        else:
            out.append(re.escape(part))
    return "".join(out)


_PATTERNS = [
    (kind, index, re.compile(_pattern(template)))
    for kind, templates in _SENTENCES.items()
    for index, template in enumerate(templates)
]


def tell(facts: Mapping[str, str], rng: Random) -> str:
    """One of the captions that tell `facts` (a value of FACTS for each name)."""
    sentences = []
    for kind in rng.choice(_ORDERS):
        template = rng.choice(_SENTENCES[kind])
        template = _CHOICE.sub(lambda choice: rng.choice(choice[1].split("|")), template)
        words = _SLOT.sub(lambda slot: rng.choice(_worded(slot[1], facts[slot[1]])), template)
        sentences.append(words[0].upper() + words[1:] + ".")
    return " ".join(sentences)


def _worded(fact: str, value: str) -> list[str]:
    return [wording for wording, meant in _VALUES[fact].items() if meant == value]


class Reading(NamedTuple):
    """What a parser makes of a caption."""

    facts: dict[str, str]  # of sentences that it could read; where two disagree on a fact, the first counts
    grammatical: bool  # the whole is a caption of the grammar
    read: int  # sentences that it could read, each kind once
    sentences: int  # of the caption, at least 1
    skeleton: str  # the caption with its facts left out: its phrasing


def read(caption: str) -> Reading:
    """Reads a caption sentence by sentence; one that is none of the grammar's tells nothing."""
    pieces = [piece.strip() for piece in re.findall(r"[^.]+\.?", caption.strip())]
    facts: dict[str, str] = {}
    kinds: list[str] = []
    skeleton = []
    for piece in pieces:
        found = _read_sentence(piece)
        if found is None:
            skeleton.append("?")
            continue
        kind, told, shape = found
        skeleton.append(shape)
        if kind not in kinds:
            facts |= told
        kinds.append(kind)
    grammatical = tuple(kinds) in _ORDERS and len(kinds) == len(pieces) and " ".join(pieces) == caption
    return Reading(facts, grammatical, len(set(kinds)), max(1, len(pieces)), " ".join(skeleton))


def _read_sentence(piece: str) -> tuple[str, dict[str, str], str] | None:
    """Kind, facts and skeleton of a sentence."""
    if not piece.endswith(".") or not piece[:1].isupper():
        return None
    text = piece[0].lower() + piece[1:-1]
    for kind, _, pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            told = {fact: _VALUES[fact][wording] for fact, wording in match.groupdict().items()}
            shape = text
            for fact in sorted(told, key=match.start, reverse=True):  # from the right, so that places stay true
                index = [w for w in _VALUES[fact] if _VALUES[fact][w] == told[fact]].index(match[fact])
                shape = f"{shape[: match.start(fact)]}<{fact} {index}>{shape[match.end(fact) :]}"
            return kind, told, shape
    return None


def fact_words() -> set[str]:
    """Words that tell one fact and nothing else: colours, shapes, verbs of events, ..."""
    common = set(re.findall(r"\w+", " ".join(itertools.chain.from_iterable(_SENTENCES.values()))))
    told = {word for wordings in _VALUES.values() for wording in wordings for word in wording.split()}
    return told - common - {"to", "it", "for", "through", "view"}


def words() -> list[str]:
    """Every word that captions use, as they use it, and the two marks."""
    found = set()
    for template in itertools.chain.from_iterable(_SENTENCES.values()):
        first, _, rest = template.partition(" ")
        slot = _SLOT.fullmatch(first.rstrip(","))
        found |= {opening.split()[0].capitalize() for opening in (_VALUES[slot[1]] if slot else [first])}
        found |= set(re.split(r"[\s,\[\]|]+", _SLOT.sub(" ", rest)))
    for wordings in _VALUES.values():
        found |= {word for wording in wordings for word in wording.split()}
    return [*sorted(found - {""}), ",", "."]
