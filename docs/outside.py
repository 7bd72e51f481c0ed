"""A hook of mkdocs: files outside docs/ that pages link to become pages of the site, so that every link stays in it."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
FOLDER = "source/"  # of the site, for what lies outside docs/
_LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def _address(file: Path) -> str:
    """Where a file of the repository stands in the site's sources."""
    if file.is_relative_to(DOCS):
        return file.relative_to(DOCS).as_posix()
    path = file.relative_to(ROOT).as_posix()
    return FOLDER + (path if file.suffix == ".md" else f"{path}.md")


def _outside(page: Path) -> set[Path]:
    """Files and folders outside docs/ that a page links to."""
    targets = ((page.parent / found[1]).resolve() for found in _LINK.finditer(page.read_text(encoding="utf-8")))
    return {target for target in targets if target.exists() and not target.is_relative_to(DOCS)}


def _content(file: Path) -> str:
    if file.suffix == ".md":
        return file.read_text(encoding="utf-8")
    title = f"# `{file.relative_to(ROOT).as_posix()}`\n\n"
    if file.is_dir():
        return title + "".join(f"- `{entry.name}`\n" for entry in sorted(file.iterdir()) if entry.name[0] not in "._")
    language = {".py": "python", ".yaml": "yaml"}.get(file.suffix, "text")
    return f"{title}~~~~{language}\n{file.read_text(encoding='utf-8')}~~~~\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    seen: set[Path] = set()
    waiting = [DOCS / page.src_uri for page in files.documentation_pages()]
    while waiting:
        for file in _outside(waiting.pop()) - seen:
            seen.add(file)
            page = File.generated(config, _address(file), content=_content(file), inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(page)
            if file.suffix == ".md":
                waiting.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at them."""
    uri = page.file.src_uri
    source = ROOT / uri.removeprefix(FOLDER) if uri.startswith(FOLDER) else DOCS / uri

    def inside(found: re.Match[str]) -> str:
        target = (source.parent / found[1]).resolve()
        if not target.exists():
            return found[0]  # mkdocs itself complains
        return f"]({posixpath.relpath(_address(target), posixpath.dirname(uri))}{found[2] or ''})"

    return _LINK.sub(inside, markdown)
