"""The documents as tests see them: fenced blocks with their languages and marks, headings, links."""

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_INDENTED = re.compile(r"^\n((?: {4}\S.*\n)+)", re.M)
_PROGRAM = re.compile(r"(\S+=\S+ )*(\.venv/bin/)?(synpo|python|make|pip|accelerate|torchrun) ")


class Block(NamedTuple):
    """A piece of code in a page."""

    page: Path
    line: int  # of its first line of code
    language: str  # "sh" for indented commands
    text: str
    reason: str | None  # why it cannot run here, from `<!-- not run: reason -->` above it

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page, and indented ones that hold commands."""
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        line = text[: found.start("text")].count("\n") + 1
        yield Block(page, line, found["language"], found["text"], found["reason"])
    for found in _INDENTED.finditer(_FENCE.sub(lambda m: "\n" * m[0].count("\n"), text)):
        if _PROGRAM.match(found[1].strip()):
            yield Block(page, text[: found.start()].count("\n") + 2, "sh", found[1], None)


def commands(block: Block) -> Iterator[str]:
    """The commands of a shell block: comments and line continuations resolved."""
    for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
        command = re.sub(r"\s#\s.*", "", line).strip()
        command = re.split(r" {3,}", command)[0]  # a description in a second column
        if command and not command.startswith("#"):
            yield command


def prose(page: Path) -> str:
    """A page without code: neither blocks nor `inline code`."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]+`", "", text)


def links(page: Path) -> list[str]:
    """Targets of links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """What `page#...` can point to: headings, in lower case, their spaces as dashes, other marks left out."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = (re.sub(r"\]\([^)]*\)|[`\[\]*]", "", heading) for heading in re.findall(r"^#+ (.+)$", text, re.M))
    plain = (unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode() for heading in headings)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain}
