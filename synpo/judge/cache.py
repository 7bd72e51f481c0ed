"""Every answer that was paid for, in one SQLite file. An answer is on disk before anybody sees it."""

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from .spending import Usage

_VERSION = 1
_COLUMNS = ("key", "model", "purpose", "text", "refusal", "finish_reason", "prompt_tokens", "completion_tokens", "time")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY,       -- sha256 of the canonical request
    model TEXT NOT NULL,        -- as asked for
    purpose TEXT NOT NULL,      -- criterion and prompt version, such as "factuality/1"
    text TEXT,                  -- the raw answer
    refusal TEXT,
    finish_reason TEXT,
    prompt_tokens INTEGER,      -- null where the server told none
    completion_tokens INTEGER,
    time TEXT NOT NULL          -- UTC
) WITHOUT ROWID
"""


class Answer(NamedTuple):
    """One reply of a server, as it came: a text or a refusal (or neither), and what it cost."""

    text: str | None
    refusal: str | None
    finish_reason: str | None
    usage: Usage | None


class AnswerCache:
    """Answers by the hash of their request.

    Several processes may share a file (write-ahead log). `put` returns when its answer is on disk; answers that come
    in together are written together. Within one process, use it from one event loop.

    Args:
        file: the SQLite file, made where it is missing; None keeps the answers in memory.

    Errors: ValueError for a file that is no cache, or one of another version.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(file or ":memory:", timeout=60, check_same_thread=False)
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _VERSION):
                raise ValueError(f"{file}: a cache of version {version}; this release reads version {_VERSION}")
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute(_SCHEMA)
            self._database.execute(f"PRAGMA user_version={_VERSION}")
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{file} cannot be used as a cache of answers: {error}") from None
        self._waiting: list[tuple[tuple[Any, ...], asyncio.Future[None]]] = []

    def get(self, key: str) -> Answer | None:
        """The answer to a request, if there is one."""
        row = self._database.execute(
            "SELECT text, refusal, finish_reason, prompt_tokens, completion_tokens FROM answers WHERE key = ?", (key,)
        ).fetchone()
        return None if row is None else Answer(*row[:3], None if row[3] is None else Usage(row[3], row[4]))

    async def put(self, key: str, model: str, purpose: str, answer: Answer) -> None:
        """Write an answer, and wait until it is on disk. One that is there already stays."""
        tokens = answer.usage or (None, None)
        row = (key, model, purpose, *answer[:3], *tokens, datetime.now(UTC).isoformat(timespec="seconds"))
        loop = asyncio.get_running_loop()
        written: asyncio.Future[None] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._write)  # after the replies that this turn of the loop brings as well
        self._waiting.append((row, written))
        await written

    def _write(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            self._insert(row for row, _ in waiting)
        except sqlite3.Error as error:
            for _, written in waiting:
                if not written.done():
                    written.set_exception(OSError(f"{self.file}: an answer cannot be written: {error}"))
        else:
            for _, written in waiting:
                if not written.done():
                    written.set_result(None)

    def _insert(self, rows: Iterator[tuple[Any, ...]]) -> None:
        marks = ", ".join("?" * len(_COLUMNS))
        with self._database:
            self._database.executemany(f"INSERT OR IGNORE INTO answers ({', '.join(_COLUMNS)}) VALUES ({marks})", rows)

    def usage(self) -> Usage:
        """Tokens of all the answers."""
        row = self._database.execute(
            "SELECT coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0) FROM answers"
        ).fetchone()
        return Usage(*row)

    def __len__(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        """Close the file; what was put is in it."""
        self._database.close()

    def export(self, file: Path) -> int:
        """Write all answers as JSON lines, by key; returns their number. `recorded` reads them."""
        rows = self._database.execute(f"SELECT {', '.join(_COLUMNS)} FROM answers ORDER BY key")
        count = 0
        with file.open("w", encoding="utf-8") as stream:
            for count, row in enumerate(rows, start=1):  # noqa: B007 (the last number is the result)
                stream.write(json.dumps(dict(zip(_COLUMNS, row, strict=True)), ensure_ascii=False) + "\n")
        return count

    @classmethod
    def recorded(cls, file: Path) -> "AnswerCache":
        """A cache in memory with the answers that `export` wrote.

        Errors: ValueError naming file and line of a line that is no answer.
        """
        cache = cls(None)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
                cache._insert(iter([tuple(record[column] for column in _COLUMNS)]))
            except (ValueError, KeyError, TypeError, sqlite3.Error) as error:
                raise ValueError(f"{file}:{number}: not a recorded answer ({type(error).__name__}: {error})") from None
        return cache
