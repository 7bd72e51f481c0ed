"""One pass over preference files that finds every problem before training does."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from .filters import FilterReport, PairFilters
from .importers import Paths, iterate_pairs
from .schema import PairError, message_text


@dataclass
class PairsReport:
    """What `check_pairs` found; print it for a page of text. Lengths are characters."""

    errors: list[str] = field(default_factory=list)  # the first max_errors messages
    error_count: int = 0
    filters: FilterReport = field(default_factory=FilterReport)
    missing_media: list[str] = field(default_factory=list)  # the first max_errors messages
    missing_media_count: int = 0
    media: Counter[str] = field(default_factory=Counter)  # "images" and "videos" -> number
    with_scores: int = 0
    mean_score_gap: float | None = None
    median_length: dict[str, float] = field(default_factory=dict)  # prompt, chosen, rejected
    chosen_longer: float | None = None  # share of the pairs whose chosen answer is the longer one

    @property
    def ok(self) -> bool:
        """No record is broken, no media file is missing, and at least one pair is left to train on."""
        return not self.error_count and not self.missing_media_count and self.filters.kept > 0

    def __str__(self) -> str:
        lines = [str(self.filters)]
        if self.median_length:
            lengths = ", ".join(f"{column} {value:.0f}" for column, value in self.median_length.items())
            lines.append(f"median length in characters: {lengths}; chosen is longer in {self.chosen_longer:.1%}")
        if self.mean_score_gap is not None:
            lines.append(f"pairs with scores: {self.with_scores}; mean score gap: {self.mean_score_gap:.3f}")
        if self.media:
            lines.append(", ".join(f"{column}: {count}" for column, count in sorted(self.media.items())))
        for title, shown, count in (
            ("records that cannot be used", self.errors, self.error_count),
            ("media files that are not there", self.missing_media, self.missing_media_count),
        ):
            if count:
                more = [f"  ... and {count - len(shown)} more"] if count > len(shown) else []
                lines += [f"{title}: {count}", *(f"  {message}" for message in shown), *more]
        return "\n".join([*lines, "ok" if self.ok else "not ok"])


def check_pairs(
    path: Paths,
    format: str = "auto",
    *,
    media_dir: str | os.PathLike[str] | None = None,
    min_score_gap: float | None = None,
    max_length: int | None = None,
    max_errors: int = 20,
) -> PairsReport:
    """Read every record of the files, go on after bad ones, and report errors, filter counts and statistics.

    Media files are looked up, not decoded. Arguments are those of `load_pairs` and `apply_filters`; max_errors bounds
    the messages kept, not the counts. Statistics cover the pairs that the filters keep.

    Raises:
        FileNotFoundError, ValueError: as `load_pairs` for paths, suffixes and formats; bad records do not raise.
    """
    report = PairsReport()
    filters = PairFilters(min_score_gap, max_length)
    lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": []}
    gaps: list[float] = []
    for where, pair in iterate_pairs(path, format, media_dir=media_dir):
        if isinstance(pair, PairError):
            report.error_count += 1
            if len(report.errors) < max_errors:
                report.errors.append(str(pair))
            continue
        if not filters.keeps(pair):
            continue
        for column, values in lengths.items():
            values.append(len(message_text(pair[column])))
        if pair["score_chosen"] is not None and pair["score_rejected"] is not None:
            gaps.append(pair["score_chosen"] - pair["score_rejected"])
        for column in ("images", "videos"):
            if pair[column]:
                report.media[column] += len(pair[column])
        for file in _missing_files(pair):
            report.missing_media_count += 1
            if len(report.missing_media) < max_errors:
                report.missing_media.append(f"{where}: {file}")
    report.filters = filters.report
    report.with_scores, report.mean_score_gap = len(gaps), fmean(gaps) if gaps else None
    if lengths["prompt"]:
        report.median_length = {column: median(values) for column, values in lengths.items()}
        answers = zip(lengths["chosen"], lengths["rejected"], strict=True)
        report.chosen_longer = fmean(chosen > rejected for chosen, rejected in answers)
    return report


def _missing_files(pair: dict[str, Any]) -> list[str]:
    """Local paths of the pair's media that are no file; URLs are not fetched."""
    media = [*pair["images"], *pair["videos"]]
    paths = [path for item in media for path in [item["path"], *(item.get("frames") or [])] if path is not None]
    return [path for path in paths if "://" not in path and not Path(path).is_file()]
