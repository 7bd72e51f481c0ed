"""Files of a run: written whole or not at all, and JSON lines that agree with the checkpoint a run resumes from."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record as a line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that a crash left unfinished, so that the next record begins a line of its own."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file; a last line that a crash cut off is left out.

    Errors: ValueError naming file and line for any other line that is not JSON.
    """
    records = []
    # not splitlines: a string in JSON may hold U+2028 and other ends of lines that are none here
    lines = path.read_text(encoding="utf-8").rstrip().split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a line of JSON: {error}") from None
    return records


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as lines of JSON, atomically."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def rewind_json_lines(path: Path, step: int) -> None:
    """Drop the records of steps after ``step``: a run resumed there writes them again."""
    if path.exists():
        write_json_lines(path, [record for record in read_json_lines(path) if record["step"] <= step])
