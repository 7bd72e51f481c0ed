"""METEOR 1.5, by its own program: the jar in the package pycocoevalcap, on Java.

There is no second implementation: other libraries' METEOR is another metric. Texts go to the program as tokens.
"""

import importlib.util
import math
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

Tokens = Sequence[str]
JAR = "meteor/meteor-1.5.jar"


class Found(NamedTuple):
    """The jar and the Java to run it, or why METEOR is left out."""

    jar: Path | None
    java: str | None
    missing: str | None


def find() -> Found:
    """Looks for the jar of an installed pycocoevalcap and for `java` on the path."""
    spec = importlib.util.find_spec("pycocoevalcap")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    jar = next((path for folder in folders if (path := Path(folder) / JAR).exists()), None)
    java = shutil.which("java")
    if jar is None:
        return Found(None, java, "pycocoevalcap is not installed: pip install 'synpo[eval]'")
    if java is None:
        return Found(jar, None, "there is no `java` on the path: install a Java runtime, 8 or newer")
    return Found(jar, java, None)


class Meteor:
    """The program, kept running; use it as a context. Errors: RuntimeError when it is missing, or stops."""

    def __init__(self) -> None:
        found = find()
        if found.missing or found.jar is None or found.java is None:
            raise RuntimeError(f"METEOR needs more than there is: {found.missing}")
        self._command = [found.java, "-Xmx2G", "-jar", str(found.jar), "-", "-", "-stdio", "-l", "en", "-norm"]

    def __enter__(self) -> Self:
        self._program = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._program.kill()
        self._program.communicate()

    def _ask(self, fields: Iterable[str], replies: int) -> list[str]:
        """The lines that the program answers with."""
        try:
            self._program.stdin.write(" ||| ".join(fields) + "\n")
            self._program.stdin.flush()
        except BrokenPipeError:
            pass  # it has stopped, which the empty answer tells
        lines = [self._program.stdout.readline() for _ in range(replies)]
        if not all(lines):
            code = self._program.wait()
            raise RuntimeError(f"METEOR stopped with exit code {code}; try its command: {shlex.join(self._command)}")
        return lines

    def scores(self, hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> tuple[float, list[float]]:
        """METEOR of the set, from statistics summed over captions, and of each caption.

        The bar that separates the program's fields is taken out of texts, as pycocoevalcap does for captions.
        """
        statistics: list[str] = []
        for tokens, texts in zip(hypotheses, references, strict=True):
            fields = [" ".join(text).replace("|||", "") for text in (*texts, tokens)]
            statistics += self._ask(["SCORE", *fields], 1)
        *each, whole = map(float, self._ask(["EVAL", *map(str.strip, statistics)], len(statistics) + 1))
        if not all(map(math.isfinite, (whole, *each))):
            raise RuntimeError(f"METEOR gave a score that is no number: {whole}, {each[:5]}")
        return whole, each
