"""The files that a build leaves: pairs as JSON lines and parquet, statistics as JSON and as a page."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Features, Json

from ..run_files import sync, write_atomically
from .schema import PAIR_FEATURES, normalise_pair
from .statistics_page import page

PAIRS_FILE = "pairs.jsonl"
PARQUET_FILE = "parquet/pairs.parquet"  # not beside the JSON lines: a folder is read with all its pair files
STATISTICS_FILE = "report/statistics.json"
PAGE_FILE = "report/statistics.html"

_COLUMNS = ("prompt", "chosen", "rejected", "images", "videos", "score_chosen", "score_rejected", "provenance")
_FEATURES = Features({**PAIR_FEATURES, "provenance": Json()})
_CHUNK = 50  # rows held at once; with their provenance about 200 kB each as Python objects
Row = dict[str, Any]


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Hold a folder against other runs on this machine. Errors: ValueError where one is writing there."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run is writing to {out}; wait for it, or choose another folder") from None
        yield


class Spool:
    """Rows on their way to the outputs: kept in a file, since which of them stay is known at the end."""

    def __init__(self, out: Path) -> None:
        self._file = out / f"{PAIRS_FILE}.spool"
        self._stream = self._file.open("w", encoding="utf-8")

    def add(self, row: Row) -> None:
        self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")

    def rows(self, without: set[int]) -> Iterator[Row]:
        """All rows in their order but those at these positions."""
        self._stream.flush()
        with self._file.open(encoding="utf-8") as stream:
            for position, line in enumerate(stream):
                if position not in without:
                    yield json.loads(line)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._file.unlink(missing_ok=True)


def write_pairs(out: Path, rows: Iterator[Row]) -> None:
    """Both files of pairs; each appears whole, in the place of an earlier one, once both are on disk."""
    targets = [out / PAIRS_FILE, out / PARQUET_FILE]
    partial = [target.with_name(target.name + ".partial") for target in targets]
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    features = Features({name: _FEATURES[name] for name in _COLUMNS})
    with (
        partial[0].open("w", encoding="utf-8") as lines,
        pq.ParquetWriter(partial[1], features.arrow_schema, compression="zstd") as parquet,
    ):
        while chunk := list(islice(rows, _CHUNK)):
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in chunk)
            columns = [{**normalise_pair(row), "provenance": row["provenance"]} for row in chunk]
            table = Dataset.from_list([{name: row[name] for name in _COLUMNS} for row in columns], features=features)
            parquet.write_table(table.data.table.cast(features.arrow_schema))
    for path in partial:
        sync(path)
    for path, target in zip(partial, targets, strict=True):
        os.replace(path, target)


def write_statistics(out: Path, summary: Mapping[str, Any]) -> None:
    """The statistics as JSON and as one page that needs nothing else."""
    write_atomically(out / STATISTICS_FILE, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_atomically(out / PAGE_FILE, page(summary))
