"""`synpo evaluate`: files in every layout, the table, the JSON, two files compared, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from synpo.caption.files import SUFFIXES
from synpo.cli import main
from synpo.evaluate import caption_metrics
from synpo.evaluate.files import ENDINGS, read_hypotheses, read_quizzes, read_references
from synpo.evaluate.model import PROTOCOLS
from synpo.miniature.captioner import WEIGHTS
from synpo.miniature.films import make_films
from synpo.miniature.films import references as tell
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
        ("list.json", [{"video": f"{video}.MPG", "pred": text} for video, text in HYPOTHESES.items()]),
        ("lists.json", {video: [text] for video, text in HYPOTHESES.items()}),  # pycocoevalcap's
        ("string.jsonl", [{"video": video, "captions": text} for video, text in HYPOTHESES.items()]),
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


def test_numbers_are_names_too(tmp_path: Path) -> None:
    captions = write(tmp_path / "results.json", [{"image_id": 7, "caption": "A dog runs."}])
    references = write(tmp_path / "references.json", {"7": ["A dog runs."]})
    assert read_hypotheses(captions).captions.keys() == read_references(references).keys() == {"7"}


def test_every_ending_of_a_video_that_is_captioned_is_known() -> None:
    assert set(ENDINGS) == set(SUFFIXES)


def test_an_end_of_line_inside_a_string_ends_no_line(tmp_path: Path) -> None:
    text = "A dog\u2028runs\x85fast."
    file = tmp_path / "captions.jsonl"
    file.write_text(json.dumps({"video": "v1", "caption": text}, ensure_ascii=False) + "\r\n\r\n", encoding="utf-8")
    assert read_hypotheses(file).captions == {"v1": text}


MSRVTT = {
    "videos": [{"video_id": "v1", "split": "test"}, {"video_id": "v2", "split": "train"}],
    "sentences": [{"video_id": video, "caption": text} for video, texts in REFERENCES.items() for text in texts],
}


def test_a_split_of_msrvtt_is_taken_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "MSRVTT_data.json", MSRVTT)
    assert read_references(file, "test") == {"v1": REFERENCES["v1"]}
    with pytest.raises(ValueError, match="split is 'val'; its videos have test, train"):
        read_references(file, "val")
    with pytest.raises(ValueError, match="split is 'test'; its videos have none"):
        read_references(write(tmp_path / "other.json", REFERENCES), "test")


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
        ([{"video": None, "caption": "x"}], REFERENCES, "captions.jsonl:1: video is None; a name or a whole number is"),
        ([{"video": "v1", "captions": []}], REFERENCES, "captions.jsonl:1: no caption; a string under one of"),
        ([{"video": "v1", "caption": "x"}], {"v1": []}, "references of 'v1' must be strings, at least one; got []"),
        ([{"video": "v1", "caption": "x"}], {"v1": {"en": ["x"], "zh": ["x"]}}, "references of 'v1' must be strings"),
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
    ("content", "message"),
    [
        ('{"v1": "a dog", "v2": "a cat", "v1": "a cow"}', "captions.json: 'v1' stands twice in one object"),
        ("", "captions.json is not JSON"),
        ("3", "captions.json holds a int; an object or a list is needed"),
        ("{}", "captions.json: no caption in it"),
    ],
)
def test_bad_objects_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "captions.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_hypotheses(file)


def test_questions_that_are_no_list_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "quiz.json", {"v1": {"question": "Who?", "answer": "A dog"}})
    with pytest.raises(
        ValueError, match=r"quiz.json: questions about 'v1' must be a list of objects; got \{'question'"
    ):
        read_quizzes(file)


def test_a_models_captions_are_written_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = make_films(tmp_path / "films", 4, seed=3)
    texts = tell(scenes, seed=0)
    del texts["film00003"]  # not captioned: there is nothing to compare it with
    references = write(tmp_path / "references.json", texts)
    before = write(tmp_path / "before.json", dict.fromkeys(texts, "A shape moves."))
    out = tmp_path / "out" / "numbers.json"
    words = [
        before, "--model", WEIGHTS, "--videos", tmp_path / "films", "--references", references, "--out", out,
        "--meteor", "off",
    ]  # fmt: skip
    assert evaluate(*words) == 0
    result = json.loads(out.read_text())
    written = tmp_path / "out" / "numbers.captions.jsonl"
    assert result["captions"] == [str(before), str(written)]
    assert result["videos"] == 3
    assert result["metrics"]["CIDEr"]["change"]["low"] > 0
    records = [json.loads(line) for line in written.read_text().splitlines()]
    assert [Path(record["video"]).stem for record in records] == list(texts)
    assert records[0]["settings"].items() >= PROTOCOLS["short"].items()
    capsys.readouterr()
    assert evaluate(*words) == 0  # nothing is captioned again
    assert json.loads(out.read_text()) == result
    assert [json.loads(line) for line in written.read_text().splitlines()] == records
    assert "3 of 3 videos captioned" in capsys.readouterr().out


def test_a_video_that_cannot_be_captioned_is_named_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_films(tmp_path / "films", 2, seed=3)
    (tmp_path / "films" / "film00001.mp4").write_bytes(b"no film")
    references = write(tmp_path / "references.json", {f"film0000{i}": ["A shape moves."] for i in range(2)})
    out = tmp_path / "numbers.json"
    words = ["--model", WEIGHTS, "--videos", tmp_path / "films", "--references", references, "--out", out]
    assert evaluate(*words) == 2
    assert "1 videos are without a caption in" in capsys.readouterr().err
    assert evaluate(*words, "--partial", "--meteor", "off") == 0
    assert json.loads(out.read_text())["videos"] == 1
    other = write(tmp_path / "others.json", {"v1": ["A shape moves."]})
    assert evaluate(*words[:-3], other, "--out", tmp_path / "other.json") == 2
    assert "has references; are they named alike?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "0 files of captions are given; one or two in all are needed"),
        (["a", "b", "--model", "m", "--videos", "v"], "2 files of captions and a model are given; one or two in all"),
        (["a.json", "--references", "b", "--model", "m"], "model and videos belong together"),
        (["--references", "b", "--model", "m", "--videos", "v"], "out is missing; the model's captions are written"),
        (["a.json", "--references", "b", "--protocol", "long"], "protocol is 'long'; allowed: short, detailed"),
        (["a.json", "--references", "b", "--judge", "j"], "a judge and something for it belong together"),
        (
            ["a.json", "--references", "b", "--judge", "j", "--detail", "--judge_options", "[]"],
            "judge_options is '[]'; a JSON object is needed",
        ),
        (["a.json"], "references is missing"),
        (["a.json", "--references", "b", "--meteor", "maybe"], "meteor is 'maybe'; allowed: auto, on, off"),
        (["a.json", "--references", "b", "--detail"], "a judge and something for it belong together"),
        (["a.json", "--references", "nowhere.json"], "nowhere.json: no such file"),
        (["a.json", "--reference", "b"], "there is no option '--reference'; did you mean '--references'?"),
    ],
)
def test_wrong_usage_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(*words) == 2
    assert message in capsys.readouterr().err
