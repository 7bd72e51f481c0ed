"""Files of a run: checkpoints that are whole or absent, and JSON lines that agree with them after a resume."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

TRAINER_STATE = "trainer_state.json"
SAVING = ".saving"  # folder in output_dir where a checkpoint grows before it is renamed into place


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint-<step> folder; -1 for any other name."""
    name, _, number = checkpoint.name.partition("-")
    return int(number) if name == "checkpoint" and number.isdigit() else -1


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint with the most steps in a run's folder, None where there is none."""
    found = sorted((p for p in Path(output_dir).glob("checkpoint-*") if is_complete(p)), key=step_of)
    return found[-1] if found else None


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder holds the last file of a save, readable and of the step that its name says."""
    try:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
    except (OSError, ValueError, TypeError):
        return False
    return state.global_step == step_of(checkpoint)


def publish(partial: Path, final: Path) -> None:
    """Move a finished checkpoint into place in one rename, its files on disk first."""
    for file in partial.rglob("*"):
        if file.is_file():
            _sync(file)
    if final.exists():  # the same step saved before: by an earlier run in this folder, or by the run that is resumed
        shutil.rmtree(final)
    os.replace(partial, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
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
    _sync(partial)
    os.replace(partial, path)


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record as a line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file; a last line that a crash cut off is left out."""
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
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
        write_json_lines(path, (record for record in read_json_lines(path) if record["step"] <= step))
