"""Preference files, and datasets in memory, read into normalised pairs."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from tqdm import tqdm

from .files import dataset_records, pair_files, read_records
from .formats import FORMATS, KNOWN_COLUMNS, PairFormat, Record, detect, with_system
from .schema import PAIR_FEATURES, PairError, normalise_pair, prompt_type

_CHUNK = 1000  # pairs held as Python objects before they become Arrow
_logger = logging.getLogger(__name__)

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def load_pairs(
    path: Paths,
    format: str = "auto",
    *,
    prompt: str | None = None,
    media_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Read preference pairs into memory, normalised: a dataset with the columns of `synpo.pairs.PAIR_FEATURES`.

    Args:
        path: a .jsonl, .json or .parquet file, a folder of them, or several of either.
        format: "auto" (found by the keys of each file's first record) or one of `synpo.pairs.FORMATS`.
        prompt: the instruction for the pairs of format "synpo-release"; default: the record's `question` where it has
            one, else `synpo.pairs.VIDEO_PROMPT`.
        media_dir: folder that relative image and video paths start from; for "synpo-release" also the folder searched
            for `video_name`. None keeps the paths as written.

    Raises:
        PairError: (a ValueError) the first bad record: file and line or row, column, and what to do.
        FileNotFoundError, ValueError: a path that does not exist, an unknown suffix or format, files without a record.
    """
    files = pair_files(path)
    pairs = _pairs(files, format, prompt, media_dir)
    progress = tqdm(pairs, desc="reading pairs", unit=" pairs", delay=2, disable=None, leave=False)
    return _dataset((_raise_if_error(pair) for _, pair in progress), ", ".join(map(str, files)))


def as_pairs(dataset: Dataset, name: str = "dataset") -> Dataset:
    """A dataset already in memory, in any known format, as normalised pairs; `name` stands for the file in errors."""
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name}: expected a datasets.Dataset (one split, not streamed), got {type(dataset).__name__}")
    if dataset.features == PAIR_FEATURES:
        return dataset
    rows = ((f"{name} row {number}", row) for number, row in enumerate(dataset_records(dataset), start=1))
    return _dataset((_raise_if_error(pair) for _, pair in _convert(rows, name, "auto", None, None)), name)


def iterate_pairs(
    path: Paths,
    format: str = "auto",
    *,
    prompt: str | None = None,
    media_dir: str | os.PathLike[str] | None = None,
) -> Iterator[tuple[str, Record | PairError]]:
    """Yield (place, normalised pair or the PairError that says why there is none), one record at a time."""
    return _pairs(pair_files(path), format, prompt, media_dir)


def _pairs(
    files: list[Path], format: str, prompt: str | None, media_dir: str | os.PathLike[str] | None
) -> Iterator[tuple[str, Record | PairError]]:
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"unknown pair format {format!r}; known: auto, {', '.join(FORMATS)}")
    media = None if media_dir is None else MediaFolder(media_dir)
    return (pair for file in files for pair in _convert(read_records(file), str(file), format, prompt, media))


def _convert(
    records: Iterable[tuple[str, Record | PairError]],
    name: str,
    format: str,
    prompt: str | None,
    media: "MediaFolder | None",
) -> Iterator[tuple[str, Record | PairError]]:
    """The pairs of one file: one format and one prompt type from the first record to the last."""
    chosen_format = FORMATS.get(format)
    first: tuple[str, str] | None = None  # place and type of the first prompt
    ignored: Counter[str] = Counter()
    without_pair = 0
    for where, record in records:
        if isinstance(record, PairError):
            yield where, record
            continue
        try:
            chosen_format = chosen_format or detect(record, where)
            chosen_format.check(record, where)
            columns = chosen_format.convert(record, where, prompt)
            if columns is None:
                without_pair += 1
                continue
            if first is not None and prompt_type(columns) != first[1]:
                raise PairError(
                    where,
                    "prompt",
                    f"mixed prompt types: {prompt_type(columns)} here, {first[1]} at {first[0]}; use one in a file",
                )
            pair = _normalise(with_system(columns, record.get("system"), where), where, chosen_format)
            if media is not None:
                media.locate(pair, where, by_name=chosen_format.name == "synpo-release")
        except PairError as error:
            yield where, error
        else:
            first = first or (where, prompt_type(columns))
            ignored.update(key for key in record if key not in KNOWN_COLUMNS and record[key] is not None)
            yield where, pair
    if without_pair:
        _logger.warning("%s: %d records without two answers of different scores hold no pair", name, without_pair)
    if ignored:
        columns_ignored = ", ".join(f"{key!r} ({count})" for key, count in sorted(ignored.items()))
        _logger.warning("%s: columns that training does not use, with their counts: %s", name, columns_ignored)


def _normalise(columns: Record, where: str, format: PairFormat) -> Record:
    try:
        return normalise_pair(columns, where)
    except PairError as error:
        if error.column is None or error.column not in format.file_columns:
            raise
        raise PairError(where, format.file_columns[error.column], error.problem) from None


def _raise_if_error(pair: Record | PairError) -> Record:
    if isinstance(pair, PairError):
        raise pair
    return pair


def _dataset(pairs: Iterator[Record], name: str) -> Dataset:
    # Chunks keep the Python objects few; Dataset.from_generator would write its cache into the home folder.
    chunks = []
    while rows := list(islice(pairs, _CHUNK)):
        chunks.append(Dataset.from_list(rows, features=PAIR_FEATURES))
    if not chunks:
        raise ValueError(f"{name}: no pairs in it")
    return concatenate_datasets(chunks)


class MediaFolder:
    """Resolves relative media paths against one folder; finds the release's `video_name` by file stem."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"media_dir {self.folder}: no such folder")
        self._by_stem: dict[str, list[Path]] | None = None

    def locate(self, pair: Record, where: str, by_name: bool) -> None:
        """Rewrite the pair's paths in place. by_name: a video path is the stem of a file anywhere in the folder."""
        for medium in [*pair["images"], *pair["videos"]]:
            if medium.get("path") is not None:
                medium["path"] = self._find(medium["path"], where) if by_name else self._join(medium["path"])
            if medium.get("frames") is not None:
                medium["frames"] = [self._join(frame) for frame in medium["frames"]]

    def _join(self, path: str) -> str:
        return path if "://" in path else str(self.folder / path)

    def _find(self, name: str, where: str) -> str:
        if (self.folder / name).is_file():
            return str(self.folder / name)
        if self._by_stem is None:
            self._by_stem = {}
            for file in sorted(self.folder.rglob("*")):
                if file.is_file():
                    self._by_stem.setdefault(file.stem, []).append(file)
        found = self._by_stem.get(name, [])
        if len(found) != 1:
            count = f"{len(found)} files" if found else "no file"
            raise PairError(where, "video_name", f"{count} named {name!r} under {self.folder}; exactly one is needed")
        return str(found[0])
