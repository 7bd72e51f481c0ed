"""Which video files a command line means."""

import glob
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".flv", ".wmv", ".ogv",
    ".3gp", ".gif",
)  # fmt: skip


def video_files(named: Sequence[str]) -> list[str]:
    """Files as named; of a folder, all files under it that end like a video, sorted; of a pattern, its matches, sorted.

    Each file comes once. A file that is named and does not exist stays in the list, to be reported with those that
    cannot be read. Errors: ValueError for nothing at all, a folder without a video, a pattern without a match.
    """
    if not named:
        raise ValueError("no video is given; name files, folders or patterns")
    found: dict[str, None] = {}
    for name in named:
        path = Path(name)
        if path.is_dir():
            inside = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise ValueError(f"folder {name!r} holds no video ({', '.join(SUFFIXES)})")
        elif not path.exists() and glob.has_magic(name):
            inside = sorted(file for file in glob.glob(name, recursive=True) if Path(file).is_file())
            if not inside:
                raise ValueError(f"pattern {name!r} matches no file")
        else:
            inside = [str(path)]
        found |= dict.fromkeys(inside)
    return list(found)
