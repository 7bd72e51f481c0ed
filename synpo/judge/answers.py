"""From a judge's reply to scores, or to the reason why there are none. Nothing is guessed.

A reply counts when it ends with one JSON object, alone or after other words, that gives every identifier asked for
exactly once, each with a whole number of the scale. The object may stand in a code fence, and reasoning models may
think before it in <think> tags. Whatever else a reply is, it has no score: numbers in prose, strings, a second object
with scores, words after the object, an identifier too many or too few.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .criteria import Criterion

MAX_LENGTH = 100_000  # characters; a longer reply is no answer to any question here
_BEGINS_AN_OBJECT = re.compile(r'\{\s*"')
_END_OF_FENCE = re.compile(r"\s*(```)?\s*")


class Unparsable(ValueError):
    """A reply without usable scores; `kind` is one of few short phrases, to be counted by."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__(kind)


def parse_scores(text: str, ids: Sequence[str], criterion: Criterion) -> list[int]:
    """The scores of a reply in the order of ids.

    Errors: Unparsable for anything but exactly one whole set of scores on the criterion's scale.
    """
    given = _answer(text)["scores"]
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise Unparsable("scores are no list of objects")
    scores: dict[str, int] = {}
    for item in given:
        if item.keys() != {"id", "score"}:
            raise Unparsable("wrong keys")
        name = item["id"]
        if not isinstance(name, str) or name not in ids:
            raise Unparsable("unknown identifier")
        if name in scores:
            raise Unparsable("identifier twice")
        scores[name] = _score(item["score"], criterion)
    if len(scores) != len(ids):
        raise Unparsable("identifier missing")
    return [scores[name] for name in ids]


def _answer(text: str) -> dict[str, Any]:
    """The one object with scores, which has to end the reply."""
    if not text.strip():
        raise Unparsable("empty")
    if len(text) > MAX_LENGTH:
        raise Unparsable("too long")
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        raise Unparsable("thinking cut off")
    found = [(value, end) for value, end in _objects(text) if "scores" in value]
    if not found:
        raise Unparsable("no object with scores")
    if len(found) > 1 or text.count('"scores":') > 1:  # inside another object, too
        raise Unparsable("more than one object with scores")
    answer, end = found[0]
    rest = _END_OF_FENCE.match(text, end)
    if rest is None or rest.end() != len(text):
        raise Unparsable("words after the object")
    if not answer.keys() <= {"reason", "scores"} or not isinstance(answer.get("reason", ""), str):
        raise Unparsable("wrong keys")
    return answer


def _objects(text: str) -> list[tuple[dict[str, Any], int]]:
    """Every JSON object in the text that is not part of another, with the place where it ends."""
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
    found: list[tuple[dict[str, Any], int]] = []
    position = text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except Unparsable:
            raise
        except (ValueError, RecursionError):
            if _BEGINS_AN_OBJECT.match(text, position):
                raise Unparsable("broken JSON") from None  # what stands inside a broken object is no answer
            end = position + 1  # a brace in prose
        else:
            found.append((value, end))
        position = text.find("{", end)
    return found


def _object(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise Unparsable("a key twice")
    return made


def _no_constant(name: str) -> float:
    raise Unparsable("a number that is none")


def _score(value: Any, criterion: Criterion) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unparsable("score is no number")
    if value not in criterion.scale:  # 4.0 is in it, as it is in the schema's enumeration; 4.5 is not
        raise Unparsable("score off the scale")
    return int(value)
