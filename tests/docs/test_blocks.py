"""The code in README, CONTRIBUTING and docs/: Python runs, commands have the options they name, JSON and YAML are read.

A block that cannot run here carries `<!-- not run: reason -->` on the line above it.
"""

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from synpo import cli
from synpo.options import read_config
from synpo.pairs import load_pairs
from synpo.train.command import OPTIONS
from tests.docs import stand_ins
from tests.docs.pages import PAGES, ROOT, Block, blocks, commands
from tests.judge.loopback import serving

EVERY = [block for page in PAGES for block in blocks(page)]
MOST_MARKED = 4

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`gradient_checkpointing` is deprecated:FutureWarning",
        "'pin_memory' argument is set as true:UserWarning",
    )
]


def of(language: str) -> list[Block]:
    return [block for block in EVERY if block.language == language and block.reason is None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder beside which examples/ lies, as in a checkout."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


@pytest.fixture(scope="module")
def judge_url() -> Iterator[str]:
    with serving() as server:
        yield server.url


def test_marks_are_few_and_languages_known() -> None:
    marked = [block for block in EVERY if block.reason is not None]
    assert len(marked) <= MOST_MARKED, [str(block) for block in marked]
    assert {block.language for block in EVERY} <= {"python", "sh", "json", "yaml", ""}
    for block in EVERY:  # what has no language is output or a tree of files
        assert block.language or not re.match(r"(import|from|synpo|python|make|pip) ", block.text), str(block)


@pytest.mark.parametrize("page", sorted({block.page for block in of("python")}), ids=lambda page: page.stem)
def test_python_runs(page: Path, folder: Path, judge_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the page, in one namespace; rows of tables that it prints are those of the page."""
    make = getattr(stand_ins, page.stem.lower(), None)
    given = make(folder) if make else stand_ins.Given({})
    names: dict[str, Any] = {"__name__": page.stem, **given.names}
    for block in of("python"):
        if block.page != page:
            continue
        text = block.text
        for written, local in ({"https://host/v1": judge_url} | given.instead).items():
            text = text.replace(written, local)
        exec(compile(text, str(block), "exec"), names)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row for row in rows if row not in page.read_text(encoding="utf-8").splitlines()] == []


@pytest.mark.parametrize("block", of("sh"), ids=str)
def test_commands_exist(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands(block):
        check(command, monkeypatch)


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is one of ours, and has the options that the command gives it."""
    words = shlex.split(re.sub(r"\$\(.*\)", "substituted", command))
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "synpo":
        parsed(rest, monkeypatch)
    elif program == "python":
        python(rest, command)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in rest:
            name, _, _ = word.partition("=")
            assert re.search(rf"^{name}( \?=|:)", makefile, re.M), f"{command}: the Makefile has no {name}"
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for name in re.findall(r"(?:synpo|\.)\[(\w+)\]", command):
            assert name in project["optional-dependencies"], command
    elif program == "accelerate":
        assert rest[:2] == ["launch", "--config_file"], command
        assert (ROOT / rest[2]).exists(), command
        assert rest[3:5] == ["-m", "synpo.cli"], command
        parsed(rest[5:], monkeypatch)
    else:
        raise AssertionError(f"{command}: {program} is not known here; mark the block as not run, with the reason")


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line's own parser takes these words."""
    with monkeypatch.context() as patch:
        for name, (module, _) in cli.COMMANDS.items():
            if name in words:
                patch.setattr(importlib.import_module(module), "main", lambda args: 0)
        assert cli.main(words) == 0, f"synpo {shlex.join(words)}"


def python(words: list[str], command: str) -> None:
    """`-c` compiles; `-m` names a module (or, for -m pytest, a path) whose source has the options; a script exists."""
    if words[0] == "-c":
        compile(words[1], command, "exec")
        return
    if words[0] == "-m" and words[1] == "pytest":
        assert all((ROOT / word.partition("::")[0]).exists() for word in words[2:] if "/" in word), command
        return
    if words[0] == "-m":
        spec = importlib.util.find_spec(words[1])
        assert spec is not None, f"{command}: no such module"
        if spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(words[1] + ".__main__")
        source, rest = Path(spec.origin).read_text(encoding="utf-8"), words[2:]
    else:
        assert (ROOT / words[0]).exists(), f"{command}: no such script"
        source, rest = (ROOT / words[0]).read_text(encoding="utf-8"), words[1:]
        source += (ROOT / "examples" / "inputs.py").read_text(encoding="utf-8")
    for word in rest:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in source, f"{command}: {word} is no option"


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_records_are_pairs(block: Block, tmp_path: Path) -> None:
    decoder, rest, count = json.JSONDecoder(), block.text.strip(), 0
    while rest:
        record, end = decoder.raw_decode(rest)
        file = tmp_path / f"{count}.jsonl"
        file.write_text(json.dumps(record) + "\n")
        media = tmp_path / f"media{count}"
        media.mkdir()
        (media / "cat.mp4").touch()
        assert len(load_pairs(file, media_dir=media)) == 1, str(block)
        rest, count = rest[end:].strip(), count + 1
    assert count > 0


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_configurations_are_read(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(block.text)
    assert read_config(file, *OPTIONS)


def test_the_quick_start_ends_in_an_adapter_and_its_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its commands one after another, as they stand, on a tiny model."""
    model = stand_ins.save_model(folder / "model")
    run = [
        shlex.split(command.removeprefix(".venv/bin/").replace("MODEL", model))[1:]
        for block in blocks(ROOT / "docs" / "quickstart.md")
        for command in commands(block)
        if re.match(r"(\.venv/bin/)?synpo (train|report|env)", command)
    ]
    assert [words[0] for words in run] == ["env", "train", "report"]
    for words in run:
        assert cli.main(words) == 0, shlex.join(words)
    out = folder / "runs" / "first"
    assert {"adapter_model.safetensors", "README.md", "metrics.jsonl"} <= set(os.listdir(out))
    assert {"report.html", "curves.png"} <= set(os.listdir(folder / "runs"))
    assert "95 % interval" in capsys.readouterr().out


def test_messages_in_troubleshooting_are_the_codes() -> None:
    """What stands in the first column of its tables is said by some line of the code, piece by piece."""
    source = " ".join(
        constant.value
        for package in ("synpo", "synpo_kernels")
        for file in (ROOT / package).rglob("*.py")
        for constant in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    )
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) > 15
    for message in messages:
        for piece in filter(None, (piece.strip() for piece in message.split("..."))):
            assert piece in source, f"{message}: {piece!r} is in no message of the code"
