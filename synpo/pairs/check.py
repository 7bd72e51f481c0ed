"""One pass over preference files that finds every problem before training does."""

import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from .filters import FilterReport, PairFilters
from .importers import Paths, iterate_pairs
from .schema import PairError, message_text

MISSING = "no such file"


@dataclass
class PairsReport:
    """What `check_pairs` found; print it for a page of text. Lengths are characters."""

    errors: list[str] = field(default_factory=list)  # the first max_errors messages
    error_count: int = 0
    filters: FilterReport = field(default_factory=FilterReport)
    missing_media: list[str] = field(default_factory=list)  # the first max_errors messages
    missing_media_count: int = 0
    unreadable_media: list[str] = field(default_factory=list)  # the first max_errors messages
    unreadable_media_count: int = 0
    media: Counter[str] = field(default_factory=Counter)  # "images" and "videos" -> number
    with_scores: int = 0
    mean_score_gap: float | None = None
    median_length: dict[str, float] = field(default_factory=dict)  # prompt, chosen, rejected
    chosen_longer: float | None = None  # share of the pairs whose chosen answer is the longer one

    @property
    def ok(self) -> bool:
        """No record is broken, no media are missing or unreadable, and at least one pair is left to train on."""
        broken = self.error_count or self.missing_media_count or self.unreadable_media_count
        return not broken and self.filters.kept > 0

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
            ("media that cannot be read", self.unreadable_media, self.unreadable_media_count),
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

    Every video on this machine is opened, its packets read and one frame decoded; every image is decoded. Arguments are
    those of `load_pairs` and `apply_filters`; max_errors bounds the messages kept, not the counts. Statistics cover the
    pairs that the filters keep.

    Raises:
        FileNotFoundError, ValueError: as `load_pairs` for paths, suffixes and formats; bad records do not raise.
    """
    report = PairsReport()
    filters = PairFilters(min_score_gap, max_length)
    lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": []}
    gaps: list[float] = []
    looked_at: dict[str, str] = {}
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
        for source, is_image in _local_media(pair):
            if source not in looked_at:
                problem = _problem(source, is_image)
                if isinstance(source, str):  # many pairs show one file
                    looked_at[source] = problem
            else:
                problem = looked_at[source]
            if problem == MISSING:
                report.missing_media_count += 1
                if len(report.missing_media) < max_errors:
                    report.missing_media.append(f"{where}: {source}")
            elif problem:
                report.unreadable_media_count += 1
                if len(report.unreadable_media) < max_errors:
                    report.unreadable_media.append(f"{where}: {problem}")
    report.filters = filters.report
    report.with_scores, report.mean_score_gap = len(gaps), fmean(gaps) if gaps else None
    if lengths["prompt"]:
        report.median_length = {column: median(values) for column, values in lengths.items()}
        answers = zip(lengths["chosen"], lengths["rejected"], strict=True)
        report.chosen_longer = fmean(chosen > rejected for chosen, rejected in answers)
    return report


def _local_media(pair: dict[str, Any]) -> Iterator[tuple[str | bytes, bool]]:
    """The path or content of each of the pair's media, and whether it is an image; URLs are not fetched."""
    for column in ("images", "videos"):
        for item in pair[column]:
            frames = item.get("frames") or []
            for source in frames or [item["bytes"] or item["path"]]:
                if isinstance(source, bytes) or "://" not in source:
                    yield source, column == "images" or bool(frames)


def _problem(source: str | bytes, is_image: bool) -> str:
    """Why a medium cannot be used; empty where it can."""
    from PIL import Image  # these take most of a second to import, and pairs of text need none of them

    from ..video import VideoError, probe

    if isinstance(source, str) and not Path(source).is_file():
        return MISSING
    try:
        if is_image:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                image.load()
        else:
            probe(source)
    except VideoError as error:
        return str(error)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow's, for PNG
        return f"{'an image' if isinstance(source, bytes) else source}: {error}"
    return ""
