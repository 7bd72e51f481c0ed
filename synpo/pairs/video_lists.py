"""Where videos come from: a folder, or the published list of a dataset with its videos in a folder.

A list says which videos belong to the dataset, and for some which seconds of them. Layouts, as published:

    sharegpt4video  JSONL: video_id, video_path ("panda/x.mp4"), captions [{idx, content}], ...
    panda-70m       CSV: videoID, url, timestamp ("[['0:00:01.5', '0:00:04.0'], ...]"), caption, matching_score, ...;
                    one item a time span, named "<videoID>@<start>-<end>"
    charades        CSV: id, subject, ..., script, descriptions, actions, length
    vatex           JSON: [{videoID: "<YouTube id>_<start>_<end>", enCap, chCap}], videos cut to that span
    msr-vtt         JSON: {videos: [{video_id, split, start time, end time, ...}], sentences: [...]}, videos cut
"""

import ast
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..caption.files import SUFFIXES


@dataclass(frozen=True)
class VideoItem:
    """One video, or a section of one, to make a pair from.

    Attributes:
        name: unique; a path relative to the folder of videos, with "@start-end" for a section.
        path: the file.
        section: (start, end) in seconds of the file; None is all of it.
    """

    name: str
    path: Path
    section: tuple[float, float] | None = None


@dataclass
class VideoList:
    """Videos that are there, in order of their names, and the names of those that a list has and the folder lacks."""

    items: list[VideoItem] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def folder_videos(folder: Path) -> VideoList:
    """The videos in a folder and its subfolders, by suffix. Hidden files and folders are left out.

    Errors: FileNotFoundError for a folder that is missing or holds no video.
    """
    found = _files(folder)
    items = [VideoItem(name, path) for name, path in sorted(found.items())]
    if not items:
        raise FileNotFoundError(f"{folder}: no video in it; known suffixes: {' '.join(SUFFIXES)}")
    return VideoList(items)


def listed_videos(file: Path, folder: Path, layout: str = "auto") -> VideoList:
    """The videos of a published list that are in a folder, found by their path, or else by their file name or stem.

    Errors: ValueError naming file and record for a list that is not laid out as published, for a layout that is
    unknown or not recognised, and for a name that fits several files; FileNotFoundError.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; allowed: auto, {', '.join(LAYOUTS)}")
    layout = _recognised(file) if layout == "auto" else layout
    found = _files(folder)
    by_stem: dict[str, list[str]] = {}
    for name, path in found.items():
        by_stem.setdefault(path.stem, []).append(name)
    listed = VideoList()
    seen: set[str] = set()
    for where, entry in LAYOUTS[layout](file):
        label = entry.video if entry.section is None else f"{entry.video}@{entry.section[0]:g}-{entry.section[1]:g}"
        if label in seen:
            continue
        seen.add(label)
        name = entry.video if entry.video in found else _by_stem(entry.video, by_stem, where)
        if name is None:
            listed.missing.append(label)
        else:
            item_name = name if entry.section is None else f"{name}@{entry.section[0]:g}-{entry.section[1]:g}"
            listed.items.append(VideoItem(item_name, found[name], entry.section))
    listed.items.sort(key=lambda item: (str(item.path), item.section or (0.0, 0.0)))
    if not seen:
        raise ValueError(f"{file}: no video in this list")
    return listed


class _Entry(NamedTuple):
    video: str
    section: tuple[float, float] | None = None


_Entries = Iterator[tuple[str, _Entry]]


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files: dict[str, Path] = {}
    for path in folder.rglob("*"):
        inside = path.relative_to(folder)
        if path.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in inside.parts) and path.is_file():
            files[inside.as_posix()] = path
    return files


def _by_stem(video: str, by_stem: dict[str, list[str]], where: str) -> str | None:
    names = by_stem.get(Path(video).stem if Path(video).suffix.lower() in SUFFIXES else Path(video).name, [])
    if len(names) > 1:
        raise ValueError(f"{where}: {video!r} fits several files: {', '.join(sorted(names)[:3])}; keep one of them")
    return names[0] if names else None


def _recognised(file: Path) -> str:
    if file.suffix == ".csv":
        columns = set(_header(file))
        for layout, needed in (("panda-70m", {"videoID", "timestamp"}), ("charades", {"id", "script", "actions"})):
            if needed <= columns:
                return layout
        raise ValueError(f"{file}: a CSV list with columns {sorted(columns)} is neither panda-70m nor charades")
    if file.suffix == ".jsonl":
        return "sharegpt4video"
    content = _json(file)
    if isinstance(content, dict) and "videos" in content:
        return "msr-vtt"
    if isinstance(content, list) and content and isinstance(content[0], dict):
        if "videoID" in content[0]:
            return "vatex"
        if "video_path" in content[0]:
            return "sharegpt4video"
    raise ValueError(f"{file}: none of the known layouts: {', '.join(LAYOUTS)}")


def _sharegpt4video(file: Path) -> _Entries:
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as stream:
            records = [(f"{file}:{n}", _loads(line, f"{file}:{n}")) for n, line in enumerate(stream, 1) if line.strip()]
    else:
        records = _records(_json(file), file)
    for where, record in records:
        yield where, _Entry(_text(record, "video_path", where))


def _panda(file: Path) -> _Entries:
    for where, row in _rows(file, ("videoID", "timestamp")):
        try:
            spans = ast.literal_eval(row["timestamp"])
            sections = [(_seconds(start), _seconds(end)) for start, end in spans]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError(f"{where}: timestamp {row['timestamp'][:60]!r} is no list of [start, end]") from None
        for start, end in sections:
            if not 0 <= start < end:
                raise ValueError(f"{where}: a time span from {start:g} s to {end:g} s")
            yield where, _Entry(row["videoID"], (start, end))


def _charades(file: Path) -> _Entries:
    for where, row in _rows(file, ("id",)):
        yield where, _Entry(row["id"])


def _vatex(file: Path) -> _Entries:
    for where, record in _records(_json(file), file):
        yield where, _Entry(_text(record, "videoID", where))


def _msr_vtt(file: Path) -> _Entries:
    content = _json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: an object with 'videos' is needed, it is a {type(content).__name__}")
    for where, record in _records(content.get("videos"), file):
        yield where, _Entry(_text(record, "video_id", where))


LAYOUTS: dict[str, Callable[[Path], _Entries]] = {
    "sharegpt4video": _sharegpt4video,
    "panda-70m": _panda,
    "charades": _charades,
    "vatex": _vatex,
    "msr-vtt": _msr_vtt,
}


def _seconds(stamp: str) -> float:
    """Seconds of "h:mm:ss.fff"."""
    hours, minutes, seconds = stamp.split(":")
    return round(int(hours) * 3600 + int(minutes) * 60 + float(seconds), 3)


def _header(file: Path) -> list[str]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        return next(csv.reader(stream), [])


def _rows(file: Path, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    if absent := [name for name in needed if name not in _header(file)]:
        raise ValueError(f"{file}: no column {absent[0]!r}; columns: {', '.join(_header(file))}")
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if any(not row[name] for name in needed):
                raise ValueError(f"{where}: {', '.join(needed)}: one of them is empty")
            yield where, row


def _json(file: Path) -> Any:
    return _loads(file.read_text(encoding="utf-8-sig"), str(file))


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: malformed JSON: {error}") from None


def _records(content: Any, file: Path) -> list[tuple[str, Any]]:
    if not isinstance(content, list):
        raise ValueError(f"{file}: a list of videos is needed, it is a {type(content).__name__}")
    return [(f"{file} record {number}", record) for number, record in enumerate(content, start=1)]


def _text(record: Any, key: str, where: str) -> str:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: text under {key!r} is needed, got {str(value)[:60]!r}")
    return value
