"""`synpo evaluate`: files in every layout, the table, the JSON, two files compared, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from synpo.cli import main
from synpo.evaluate import caption_metrics
from synpo.evaluate.files import read_hypotheses, read_quizzes, read_references
from tests.evaluate.made_captions import make_set

HYPOTHESES = {"v1": "A dog runs.", "v2": "A man cooks rice."}
REFERENCES = {"v1": ["A dog is running.", "The dog runs fast."], "v2": ["A man cooks."]}


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
    else:
        path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("object.json", HYPOTHESES),
        ("lines.jsonl", [{"video_id": video, "caption": text} for video, text in HYPOTHESES.items()]),
        ("list.json", [{"video": f"{video}.mp4", "pred": text} for video, text in HYPOTHESES.items()]),
        (
            "caption.jsonl",  # as `synpo caption` writes it
            [
                {"video": f"films/{v}.mp4", "captions": [{"text": t, "failure": None}, {"text": "x", "failure": None}]}
                for v, t in HYPOTHESES.items()
            ],
        ),
    ],
)
def test_captions_are_read_in_every_layout(tmp_path: Path, name: str, content: Any) -> None:
    assert read_hypotheses(write(tmp_path / name, content)).captions == HYPOTHESES


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("object.json", REFERENCES),
        ("vatex.json", [{"videoID": video, "enCap": texts, "chCap": ["?"]} for video, texts in REFERENCES.items()]),
        (
            "msrvtt.json",
            {
                "videos": [],
                "sentences": [{"video_id": v, "caption": t} for v, texts in REFERENCES.items() for t in texts],
            },
        ),
        ("coco.json", {"annotations": [{"image_id": v, "caption": t} for v in REFERENCES for t in REFERENCES[v]]}),
        ("lines.jsonl", [{"video": f"{v}.mp4", "references": texts} for v, texts in REFERENCES.items()]),
    ],
)
def test_references_are_read_in_every_layout(tmp_path: Path, name: str, content: Any) -> None:
    assert read_references(write(tmp_path / name, content)) == REFERENCES


def test_quizzes_are_read_in_both_layouts(tmp_path: Path) -> None:
    lines = [{"video": "v1.mp4", "question": "Who?", "answer": "A dog", "aspect": "object"}]
    expected = read_quizzes(write(tmp_path / "lines.jsonl", lines))
    assert expected[0] == ("v1", "Who?", "A dog", "object")
    assert read_quizzes(write(tmp_path / "object.json", {"v1": [{**lines[0]}]})) == expected


def evaluate(*words: object) -> int:
    return main(["evaluate", *map(str, words)])


def test_one_file_gives_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = write(tmp_path / "captions.json", HYPOTHESES)
    references = write(tmp_path / "references.json", REFERENCES)
    out = tmp_path / "out" / "metrics.json"
    assert evaluate(captions, "--references", references, "--out", out, "--meteor", "off") == 0
    result = json.loads(out.read_text())
    values = {name: row["values"][0] for name, row in result["metrics"].items()}
    assert values == caption_metrics(HYPOTHESES, REFERENCES, meteor=False)
    assert result["METEOR"]
    shown = capsys.readouterr().out
    assert "videos: 2" in shown
    assert f"{values['CIDEr']:.4f}" in shown


def test_two_files_are_compared_by_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after, texts = make_set(60, seed=5)
    before = {video: " ".join(text.split()[::2]) for video, text in after.items()}  # every other word
    files = [write(tmp_path / f"{name}.json", content) for name, content in (("before", before), ("after", after))]
    references = write(tmp_path / "references.json", texts)
    out = tmp_path / "compared.json"
    assert evaluate(*files, "--references", references, "--out", out, "--meteor", "off") == 0
    rows = json.loads(out.read_text())["metrics"]
    for name, row in rows.items():
        old, new = row["values"]
        assert row["change"]["mean"] == pytest.approx(new - old, abs=1e-9), name
        assert 0 < row["change"]["low"] < new - old < row["change"]["high"], name
    assert "95 % interval" in capsys.readouterr().out
    assert evaluate(files[0], files[0], "--references", references, "--out", out, "--meteor", "off") == 0
    assert {tuple(row["change"].values()) for row in json.loads(out.read_text())["metrics"].values()} == {(0, 0, 0)}


def test_what_is_incomplete_is_refused_or_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {"text": "half a", "failure": "the logits were not a number"}
    lines = [
        {"video": "v1.mp4", "caption": "A dog runs."},
        {"video": "v2.mp4", "captions": [failed]},
        {"video": "v3.mp4", "caption": "Nobody knows."},
    ]
    captions = write(tmp_path / "captions.jsonl", lines)
    references = write(tmp_path / "references.json", {**REFERENCES, "v4": ["Rain."]})
    assert evaluate(captions, "--references", references) == 2
    error = capsys.readouterr().err
    assert "2 videos are without a caption in" in error
    assert "'v2' (the logits were not a number)" in error
    out = tmp_path / "out.json"
    assert evaluate(captions, "--references", references, "--partial", "--out", out, "--meteor", "off") == 0
    result = json.loads(out.read_text())
    assert result["videos"] == 1
    assert result["left_out"] == {f"a caption in {captions}": 2, "references": 1}


@pytest.mark.parametrize(
    ("captions", "references", "message"),
    [
        ([{"caption": "x"}], REFERENCES, "captions.jsonl:1: no video; a name under one of video,"),
        ([{"video": "v1"}], REFERENCES, "captions.jsonl:1: no caption; a string under one of"),
        ([{"video": "v1", "caption": "x"}] * 2, REFERENCES, "captions.jsonl:2: a second caption of 'v1'"),
        ([], REFERENCES, "captions.jsonl: no caption in it"),
        ([{"video": "v1", "caption": "x"}], {"v1": []}, "references of 'v1' must be strings, at least one; got []"),
        ([{"video": "v1", "caption": "x"}], {"w": ["x"]}, "1 videos are without a caption in"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], captions: Any, references: Any, message: str
) -> None:
    files = write(tmp_path / "captions.jsonl", captions), write(tmp_path / "references.json", references)
    assert evaluate(files[0], "--references", files[1]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "0 files of captions are given; one or two are needed"),
        (["a.json"], "references is missing"),
        (["a.json", "--references", "b", "--meteor", "maybe"], "meteor is 'maybe'; allowed: auto, on, off"),
        (["a.json", "--references", "b", "--detail"], "detail and quiz need a judge; give --judge"),
        (["a.json", "--references", "nowhere.json"], "nowhere.json: no such file"),
        (["a.json", "--reference", "b"], "there is no option '--reference'; did you mean '--references'?"),
    ],
)
def test_wrong_usage_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(*words) == 2
    assert message in capsys.readouterr().err
