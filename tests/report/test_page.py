"""The page of a report: what it shows, and that it needs nothing but itself."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from synpo import cli, report, report_samples
from tests.pairs.making import make_videos

VOID = {"meta", "img", "source"}


class Tags(HTMLParser):
    """Every tag that is opened is closed, in order; addresses are collected."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attributes if name in ("src", "srcset", "href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def captions(file: Path, films: list[Path], text: str) -> Path:
    rows = [{"video": str(film), "captions": [{"text": f"{text} {film.stem} <b>", "failure": None}]} for film in films]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs with settings, curves and evaluations of the same films."""
    films = sorted(make_videos(tmp_path / "films", 9).iterdir())
    references = tmp_path / "references.json"
    references.write_text(json.dumps({film.stem: ["A ramp moves."] for film in films}))
    before = captions(tmp_path / "before.jsonl", films, "a ramp stands in")
    made = []
    for name, rate in (("synpo", 0.001), ("dpo", 0.0003)):
        folder = tmp_path / name
        (folder / "evaluation").mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"learning_rate": rate, "model": "tiny"}))
        lines = [{"step": step, "loss": 1.0, "eval_logps/chosen": -1.0 - step} for step in range(3)]
        (folder / report.METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        after = captions(folder / "after.jsonl", films, f"a ramp moves for {name} in")
        change = {"mean": 0.25, "low": 0.125, "high": 0.375} if name == "synpo" else {"mean": 0, "low": -1, "high": 1}
        numbers = {
            "captions": [str(before), str(after)],
            "references": str(references),
            "videos": len(films),
            "metrics": {"CIDEr": {"values": [0.5, 0.75], "change": change}, "diversity": {"values": [1.0, 0.5]}},
        }
        (folder / "evaluation" / "greedy.json").write_text(json.dumps(numbers))
        made.append(folder)
    return made


def page_of(runs: list[Path], out: Path) -> str:
    assert cli.main(["report", *map(str, runs), "--out", str(out)]) == 0
    return (out / report.PAGE_FILE).read_text(encoding="utf-8")


def test_two_runs_stand_side_by_side_and_the_page_needs_nothing_else(runs: list[Path], tmp_path: Path) -> None:
    page = page_of(runs, tmp_path / "out")
    addresses = Tags(page).addresses
    assert all(address.startswith("data:image/") for address in addresses)
    assert len(addresses) == 2 * 2 + report_samples.SAMPLES  # two panels on light and dark ground, strips
    assert "<script" not in page
    assert "url(" not in page
    row = re.search(r"<tr><td>CIDEr</td>.*?</tr>", page, re.DOTALL)[0]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", row) == [
        "CIDEr", "0.500", "0.750", "+0.250", "[+0.125, +0.375]", "0.500", "0.750", "+0.000", "[-1.000, +1.000]",
    ]  # fmt: skip
    assert row.count('class="n up"') == 1  # an interval that holds 0 is not coloured
    assert page.count("<dt>before</dt>") == report_samples.SAMPLES
    assert page.count("<dt>dpo</dt>") == report_samples.SAMPLES
    assert '<tr class="differs"><td>learning_rate</td>' in page
    assert "<tr><td>model</td>" in page


def test_captions_are_text_and_new_words_are_marked(runs: list[Path], tmp_path: Path) -> None:
    page = page_of(runs, tmp_path / "out")
    assert "a ramp <mark>moves for synpo</mark> in video00 &lt;b&gt;" in page
    assert "<b>" not in page
    assert report_samples.marked("a red ring", "a red ring") == "a red ring"


def test_what_is_gone_is_left_out_or_said(runs: list[Path], tmp_path: Path) -> None:
    film = tmp_path / "films" / "video00.mp4"
    film.unlink()
    page = page_of(runs[:1], tmp_path / "out")
    assert "No frames: " in page
    for file in (tmp_path / "before.jsonl", runs[0] / "after.jsonl"):
        file.unlink()
    assert "Sample videos" not in page_of(runs[:1], tmp_path / "out")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"captions": ["a"], "metrics": 3, "references": "", "videos": 1}', "no"]
)
def test_a_foreign_file_among_the_evaluations_is_named(
    runs: list[Path], tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs[0] / "evaluation" / "other.json").write_text(content)
    assert cli.main(["report", str(runs[0]), "--out", str(tmp_path)]) == 2
    assert "other.json is not what `synpo evaluate --out` writes" in capsys.readouterr().err


def test_a_file_of_metrics_alone_has_a_page(runs: list[Path], tmp_path: Path) -> None:
    page = page_of([runs[0] / report.METRICS_FILE], tmp_path / "out")
    Tags(page)
    assert "Curves" in page
    assert "Settings" not in page
    held_out: dict[str, Any] = report.held_out_values([report.read_run(runs[0], "a")])
    assert held_out == {"logps/chosen": [(-1.0, -3.0)]}
