"""Which pairs are kept, with a count and a place for everything that is not; and the train / evaluation split."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from .schema import message_text

_EXAMPLES = 3  # places kept per filter in the report


@dataclass
class FilterReport:
    """What each filter dropped. A pair is counted once, by the first filter that drops it; print it for a table."""

    total: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # filter -> pairs, in the order the filters ran
    examples: dict[str, list[str]] = field(default_factory=dict)  # filter -> the first places dropped

    def __str__(self) -> str:
        width = max(map(len, [*self.dropped, "pairs read"]))
        lines = [f"{'pairs read':<{width}}  {self.total:>8}"]
        for name, count in self.dropped.items():
            places = self.examples[name]
            shown = f"  {', '.join(places)}{', ...' if count > len(places) else ''}" if places else ""
            lines.append(f"{name:<{width}}  {-count:>8}{shown}")
        return "\n".join([*lines, f"{'kept':<{width}}  {self.kept:>8}"])


class PairFilters:
    """The filters, applied to one normalised pair after the other; it remembers what it has seen, for duplicates.

    In this order: "empty" (prompt without text and media, or a blank answer), "same answers" (alike but for white
    space), "score missing" and "score gap" (with min_score_gap), "length" (with max_length), "duplicate" (same prompt,
    media and answers as an earlier kept pair but for white space).
    """

    def __init__(
        self,
        min_score_gap: float | None = None,
        max_length: int | None = None,
        length: Callable[[str], int] = len,
    ) -> None:
        if max_length is not None and max_length <= 0:
            raise ValueError(f"max_length must be positive or None, got {max_length}")
        if min_score_gap is not None and not math.isfinite(min_score_gap):
            raise ValueError(f"min_score_gap must be a finite number or None, got {min_score_gap}")
        self._min_score_gap, self._max_length, self._length = min_score_gap, max_length, length
        self._seen: set[bytes] = set()
        names = ["empty", "same answers"]
        names += [] if min_score_gap is None else ["score missing", "score gap"]
        names += [] if max_length is None else ["length"]
        names.append("duplicate")
        self.report = FilterReport(dropped=dict.fromkeys(names, 0), examples={name: [] for name in names})

    def keeps(self, pair: Mapping[str, Any]) -> bool:
        """Whether the pair stays; the report is brought up to date."""
        return self.dropped_by(pair) is None

    def dropped_by(self, pair: Mapping[str, Any]) -> str | None:
        """The name of the filter that drops the pair, None for a pair that stays; the report is brought up to date."""
        name = self._first(pair)
        self.report.total += 1
        if name is None:
            self.report.kept += 1
            return None
        self.report.dropped[name] += 1
        if len(self.report.examples[name]) < _EXAMPLES:
            self.report.examples[name].append(pair["source"])
        return name

    def _first(self, pair: Mapping[str, Any]) -> str | None:
        prompt, chosen, rejected = (message_text(pair[column]) for column in ("prompt", "chosen", "rejected"))
        has_prompt = prompt.strip() or pair["images"] or pair["videos"]
        if not (has_prompt and chosen.strip() and rejected.strip()):
            return "empty"
        if _fold(chosen) == _fold(rejected):
            return "same answers"
        if self._min_score_gap is not None:
            if pair["score_chosen"] is None or pair["score_rejected"] is None:
                return "score missing"
            if pair["score_chosen"] - pair["score_rejected"] < self._min_score_gap:
                return "score gap"
        if self._max_length is not None:
            answer = max(self._length(chosen), self._length(rejected))
            if self._length(prompt) + answer > self._max_length:
                return "length"
        key = hashlib.sha256(prompt_key(pair) + _digest([_fold(chosen), _fold(rejected)])).digest()
        if key in self._seen:
            return "duplicate"
        self._seen.add(key)
        return None


def apply_filters(
    dataset: Dataset,
    *,
    min_score_gap: float | None = None,
    max_length: int | None = None,
    length: Callable[[str], int] = len,
) -> tuple[Dataset, FilterReport]:
    """Drop the pairs that cannot teach a preference, and say how many and where. Nothing is dropped silently.

    Always on: empty prompts or answers, answers alike but for white space, duplicates (see `PairFilters`).

    Args:
        dataset: normalised pairs, from `load_pairs` or `as_pairs`.
        min_score_gap: keep pairs with score_chosen - score_rejected >= this (the paper's recipe: 4); pairs without
            both scores are dropped under their own name.
        max_length: keep pairs whose prompt plus longer answer is at most this long, media not counted.
        length: how long a text is: characters by default; for tokens, lambda text: len(tokenizer(text).input_ids).

    Returns:
        the kept pairs in their order (possibly none), and the report.

    Raises:
        ValueError: min_score_gap is given and no pair has scores, or is not finite; max_length is not positive.
    """
    filters = PairFilters(min_score_gap, max_length, length)
    if min_score_gap is not None and len(dataset) and not _any_scores(dataset):
        raise ValueError(
            f"min_score_gap={min_score_gap} needs scores, but no pair has both score_chosen and score_rejected; "
            "score the pairs or leave min_score_gap out"
        )
    kept = [index for index, pair in enumerate(dataset) if filters.keeps(pair)]
    return dataset.select(kept), filters.report


def split_pairs(dataset: Dataset, eval_fraction: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split into (train, evaluation): the same rows for the same seed on any machine, no prompt on both sides.

    All pairs of one prompt (text after white-space folding, and media) go to one side, so the evaluation side has about
    eval_fraction of the pairs: at most round(eval_fraction * pairs), unless the smallest prompt is larger. At least one
    pair is on each side. Rows keep their order.

    Raises:
        ValueError: eval_fraction outside (0, 1), or fewer than two different prompts.
    """
    if not 0 < eval_fraction < 1:
        raise ValueError(f"eval_fraction must lie between 0 and 1, both excluded, got {eval_fraction}")
    groups: dict[bytes, list[int]] = {}
    for index, pair in enumerate(dataset):
        groups.setdefault(prompt_key(pair), []).append(index)
    if len(groups) < 2:
        raise ValueError(
            f"{len(dataset)} pairs with {len(groups)} different prompts cannot be split without the same prompt on "
            "both sides; give more pairs, or a separate evaluation file"
        )
    target = min(max(1, round(eval_fraction * len(dataset))), len(dataset) - 1)
    # Ordered by a seeded hash: independent of Python's random and of the order of the rows.
    order = sorted(groups, key=lambda key: hashlib.sha256(str(seed).encode() + b":" + key).digest())
    held_out: set[int] = set()
    for key in order:
        if len(held_out) + len(groups[key]) <= target:
            held_out.update(groups[key])
    if not held_out:
        held_out.update(groups[min(order, key=lambda key: len(groups[key]))])
    rows = range(len(dataset))
    return dataset.select([i for i in rows if i not in held_out]), dataset.select([i for i in rows if i in held_out])


def prompt_key(pair: Mapping[str, Any]) -> bytes:
    """Hash of a normalised pair's prompt and media: equal for prompts that differ only in white space."""
    messages = [
        [m["role"], _fold(m["content"]) if isinstance(m["content"], str) else [_fold_part(p) for p in m["content"]]]
        for m in pair["prompt"]
    ]
    media = [
        {name: hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value for name, value in item.items()}
        for item in [*pair["images"], *pair["videos"]]
    ]
    return _digest([messages, media])


def _fold(text: str) -> str:
    return " ".join(text.split())


def _fold_part(part: Mapping[str, Any]) -> list[str]:
    return [part["type"], _fold(part.get("text") or "")]


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()


def _any_scores(dataset: Dataset) -> bool:
    scores = zip(dataset["score_chosen"], dataset["score_rejected"], strict=True)
    return any(chosen is not None and rejected is not None for chosen, rejected in scores)
