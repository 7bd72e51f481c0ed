"""Preference files of the formats in use, read into normalised pairs. docs/data.md shows each format."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from tqdm import tqdm

from .files import dataset_records, pair_files, read_records
from .schema import MEDIA_COLUMNS, PAIR_FEATURES, PairError, normalise_pair, prompt_type

VIDEO_PROMPT = "Describe this video in detail: the setting, the people and objects in it, and what happens, in order."

_CHUNK = 1000  # pairs held as Python objects before they become Arrow
_logger = logging.getLogger(__name__)

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Record = dict[str, Any]


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
            one, else `VIDEO_PROMPT`.
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
    for where, record in records:
        if isinstance(record, PairError):
            yield where, record
            continue
        try:
            chosen_format = chosen_format or _detect(record, where)
            chosen_format.check(record, where)
            columns = chosen_format.convert(record, where, prompt)
            first = first or (where, prompt_type(columns))
            if prompt_type(columns) != first[1]:
                raise PairError(
                    where,
                    "prompt",
                    f"mixed prompt types: {prompt_type(columns)} here, {first[1]} at {first[0]}; use one in a file",
                )
            pair = normalise_pair(_with_system(columns, record.get("system"), where), where)
            if media is not None:
                media.locate(pair, where, by_name=chosen_format.name == "synpo-release")
        except PairError as error:
            yield where, error
        else:
            ignored.update(key for key in record if key not in _KNOWN_COLUMNS and record[key] is not None)
            yield where, pair
    if ignored:
        columns_ignored = ", ".join(f"{key!r} ({count})" for key, count in sorted(ignored.items()))
        _logger.warning("%s: columns that training does not use, with their counts: %s", name, columns_ignored)


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


def _columns(record: Record, where: str, prompt: str | None) -> Record:
    return dict(record)


def _implicit(record: Record, where: str, prompt: str | None) -> Record:
    """Two whole conversations that share everything before their last messages."""
    for column in ("chosen", "rejected"):
        if not isinstance(record[column], list) or len(record[column]) < 2:
            raise PairError(
                where,
                column,
                "without a column 'prompt', the answers must be conversations that begin with the prompt's messages",
            )
    return {**record, **_shared_prompt(record["chosen"], record["rejected"], "rejected", where)}


def _sharegpt(record: Record, where: str, prompt: str | None) -> Record:
    converted: Record = {**record}
    for source, target in (("conversations", "prompt"), ("chosen", "chosen"), ("rejected", "rejected")):
        turns = record[source] if source == "conversations" else [record[source]]
        if not isinstance(turns, list):
            raise PairError(where, source, f"expected a list of turns, got a {type(turns).__name__}")
        converted[target] = [_turn(turn, index, source, where) for index, turn in enumerate(turns)]
    return converted


def _turn(turn: Any, index: int, column: str, where: str) -> Record:
    if not isinstance(turn, Mapping) or turn.get("from") is None or turn.get("value") is None:
        raise PairError(where, column, f"turn {index}: expected a dict with 'from' and 'value', got {_brief(turn)}")
    if turn["from"] not in _SHAREGPT_ROLES:
        known = ", ".join(_SHAREGPT_ROLES)
        raise PairError(where, column, f"turn {index}: 'from' is {turn['from']!r}, which is none of {known}")
    return {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}


def _ms_swift(record: Record, where: str, prompt: str | None) -> Record:
    messages = record["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise PairError(where, "messages", "expected messages that end with the chosen answer")
    for kind in MEDIA_COLUMNS.values():
        if record.get(f"rejected_{kind}") not in (None, [], record.get(kind)):
            raise PairError(where, f"rejected_{kind}", f"differs from '{kind}'; both answers must share one prompt")
    if (rejected := record.get("rejected_messages")) is not None:
        if not isinstance(rejected, list) or len(rejected) < 2:
            raise PairError(where, "rejected_messages", "expected messages that end with the rejected answer")
        return {**record, **_shared_prompt(messages, rejected, "rejected_messages", where)}
    answer = record["rejected_response"]
    if not isinstance(answer, str):
        raise PairError(where, "rejected_response", f"expected one answer as text, got {_brief(answer)}")
    rejected_message = [{"role": "assistant", "content": answer}]
    return {**record, "prompt": messages[:-1], "chosen": messages[-1:], "rejected": rejected_message}


def _synpo_release(record: Record, where: str, prompt: str | None) -> Record:
    question = prompt if prompt is not None else record.get("question") or VIDEO_PROMPT
    for column, value in (("video_name", record["video_name"]), ("question", question)):
        if not isinstance(value, str):
            raise PairError(where, column, f"expected text, got {_brief(value)}")
    return {
        "prompt": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}],
        "chosen": [{"role": "assistant", "content": record["pos_pre"]}],
        "rejected": [{"role": "assistant", "content": record["neg_pre"]}],
        "videos": [record["video_name"]],
        "score_chosen": record.get("pos_score"),
        "score_rejected": record.get("neg_score"),
    }


def _shared_prompt(chosen: list[Any], rejected: list[Any], column: str, where: str) -> Record:
    if chosen[:-1] != rejected[:-1]:
        pairs = zip(chosen[:-1], rejected[:-1], strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)) - 1)
        raise PairError(
            where, column, f"message {at} differs from the chosen conversation's; only the last of each may differ"
        )
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _with_system(columns: Record, system: Any, where: str) -> Record:
    """Put a `system` column, where there is one, in front of the prompt's messages."""
    if not system:
        return columns
    if not isinstance(system, str):
        raise PairError(where, "system", f"expected text, got {_brief(system)}")
    prompt = columns["prompt"]
    if not isinstance(prompt, list):
        raise PairError(where, "system", "a plain prompt has no system message; give prompt and answers as messages")
    if prompt and isinstance(prompt[0], Mapping) and prompt[0].get("role") == "system":
        raise PairError(where, "system", "the conversation has a system message already; keep one of the two")
    return {**columns, "prompt": [{"role": "system", "content": system}, *prompt]}


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class PairFormat:
    """A file format: the keys a record must have, and how it becomes the columns of a pair."""

    name: str
    required: tuple[str, ...]
    convert: Callable[[Record, str, str | None], Record]
    one_of: tuple[str, ...] = ()

    def missing(self, record: Record) -> list[str]:
        absent = [key for key in self.required if record.get(key) is None]
        if self.one_of and all(record.get(key) is None for key in self.one_of):
            absent.append(" or ".join(self.one_of))
        return absent

    def check(self, record: Record, where: str) -> None:
        if absent := self.missing(record):
            found = ", ".join(str(key) for key in record if record[key] is not None) or "none"
            problem = f"missing or null for format {self.name!r}: {', '.join(absent)}; columns found: {found}"
            raise PairError(where, None, problem)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join([*self.required, *([' or '.join(self.one_of)] if self.one_of else [])])})"


# In the order of detection: "implicit" needs the fewest keys, so it is asked last.
FORMATS = {
    format.name: format
    for format in (
        PairFormat("sharegpt", ("conversations", "chosen", "rejected"), _sharegpt),
        PairFormat("ms-swift", ("messages",), _ms_swift, one_of=("rejected_response", "rejected_messages")),
        PairFormat("synpo-release", ("video_name", "pos_pre", "neg_pre"), _synpo_release),
        PairFormat("columns", ("prompt", "chosen", "rejected"), _columns),
        PairFormat("implicit", ("chosen", "rejected"), _implicit),
    )
}

_KNOWN_COLUMNS = frozenset(PAIR_FEATURES) | {
    "system", "conversations", "messages", "rejected_response", "rejected_messages", "rejected_images",
    "rejected_videos", "video_name", "pos_pre", "neg_pre", "pos_score", "neg_score", "question",
}  # fmt: skip


def _detect(record: Record, where: str) -> PairFormat:
    for format in FORMATS.values():
        if not format.missing(record):
            return format
    found = ", ".join(str(key) for key in record if record[key] is not None) or "none"
    known = "; ".join(map(str, FORMATS.values()))
    raise PairError(where, None, f"no known pair format has these columns: {found}. Known formats: {known}")


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
