"""Records out of JSONL, JSON and parquet files, each with the place it stands at."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List

from .schema import PairError

SUFFIXES = (".jsonl", ".json", ".parquet")
_PARQUET_BATCH = 256  # rows decoded at once


def pair_files(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files named by one path, a folder (its .jsonl, .json, .parquet files, sorted; no subfolders), or several.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no such file.
        ValueError: an unknown suffix, or no path at all.
    """
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    if not paths:
        raise ValueError("no pair file given; name at least one file or folder")
    files: list[Path] = []
    for entry in map(Path, paths):
        if entry.is_dir():
            inside = sorted(f for f in entry.iterdir() if f.suffix in SUFFIXES and not f.name.startswith("."))
            if not inside:
                raise FileNotFoundError(f"{entry}: the folder holds no {', '.join(SUFFIXES)} file")
            files += inside
        elif not entry.exists():
            raise FileNotFoundError(f"{entry}: no such file or folder")
        elif entry.suffix not in SUFFIXES:
            raise ValueError(f"{entry}: unknown suffix {entry.suffix!r}; pair files end in {', '.join(SUFFIXES)}")
        else:
            files.append(entry)
    return files


def read_records(file: Path) -> Iterator[tuple[str, dict[str, Any] | PairError]]:
    """Yield (place, record) for each record; a record that cannot be read comes as the PairError that says why.

    JSONL and parquet are streamed; a JSON array is read whole. Places count from 1: "f.jsonl:3" is a line,
    "f.json record 3" and "f.parquet row 3" are records.
    """
    if file.suffix == ".parquet":
        yield from _parquet(file)
    elif file.suffix == ".json" and _first_character(file) == b"[":
        yield from _json_array(file)
    else:
        yield from _json_lines(file)


def dataset_records(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The rows of a dataset, images left as their path or bytes."""
    dataset = dataset.with_format(None)
    for column, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
    yield from dataset


def _first_character(file: Path) -> bytes:
    with file.open("rb") as stream:
        start = stream.read(3)
        if start != b"\xef\xbb\xbf":
            stream.seek(0)
        while (character := stream.read(1)) and character.isspace():
            pass
    return character


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any] | PairError]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{file}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield where, _record(json.loads(text), where)
            except UnicodeDecodeError as error:
                yield where, PairError(where, None, f"not UTF-8 at byte {error.start}: {error.reason}")
            except json.JSONDecodeError as error:
                hint = "" if file.suffix == ".jsonl" else "; a .json file holds one array [...] or one object per line"
                yield where, PairError(where, None, f"malformed JSON at character {error.pos + 1}: {error.msg}{hint}")
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; endless nesting
                yield where, PairError(where, None, f"malformed JSON: {error}")


def _json_array(file: Path) -> Iterator[tuple[str, dict[str, Any] | PairError]]:
    try:
        records = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield str(file), PairError(str(file), None, f"not UTF-8 at byte {error.start}: {error.reason}")
    except json.JSONDecodeError as error:
        where = f"{file}:{error.lineno}"
        yield where, PairError(where, None, f"malformed JSON at character {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; endless nesting
        yield str(file), PairError(str(file), None, f"malformed JSON: {error}")
    else:
        for number, record in enumerate(records, start=1):
            where = f"{file} record {number}"
            yield where, _record(record, where)


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, Any] | PairError]]:
    number = 0
    try:
        with pq.ParquetFile(file) as parquet:
            # Files written by datasets carry their features, without which JSON columns would come back as strings.
            features = Features.from_arrow_schema(parquet.schema_arrow)
            for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH):
                for record in dataset_records(Dataset(pa.Table.from_batches([batch]).cast(features.arrow_schema))):
                    number += 1
                    yield f"{file} row {number}", record
    except (pa.ArrowException, OSError) as error:
        where = f"{file} row {number + 1}" if number else str(file)
        yield where, PairError(where, None, f"not readable as parquet: {error}")


def _record(value: Any, where: str) -> dict[str, Any] | PairError:
    if isinstance(value, dict):
        return value
    return PairError(where, None, f"expected an object with named columns, got a {type(value).__name__}")
