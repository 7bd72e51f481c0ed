"""`synpo pairs` on the command line: real videos through a tiny video-language model and a judge on the loopback."""

import json
import logging

import pytest
import yaml

from synpo import cli
from synpo.judge import AnswerCache
from synpo.pairs import check_pairs
from tests.caption import tiny
from tests.judge.loopback import CRITERIA, serving, true_score
from tests.video.films import real

from .making import make_videos


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny LLaVA with its tokenizer and the settings of its pixels, on disk."""
    folder = tmp_path_factory.mktemp("model")
    tiny.save_llava(folder)
    return folder


def judge_by_hash(question):
    return [true_score(question.criterion, text) for text in question.captions]


SMALL = ["--num_frames", "2", "--max_new_tokens", "8", "--min_score_gap", "2"]
ORACLE = "python:tests.pairs.test_command:judge_by_hash"


def test_real_videos_through_a_tiny_model_and_a_server(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-to-be-seen")
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("bikes.mp4", "carphone_pristine.mp4"):
        (videos / name).symlink_to(real(name.removesuffix(".mp4")))
    out = tmp_path / "pairs"
    with serving() as server:
        words = ["pairs", "--videos", str(videos), "--model", str(model), "--judge", "loopback", "--out", str(out)]
        words += ["--judge_url", server.url, "--price_in", "1", "--price_out", "2", *SMALL]
        assert cli.main(words) == 0
        assert server.count <= 2 * 17
        first = (out / "pairs.jsonl").read_bytes()
        paid = server.count
        assert cli.main(words) == 0  # again: nothing is written anew, nothing is asked
        assert server.count == paid
    assert (out / "pairs.jsonl").read_bytes() == first
    assert "pairs from 2 videos" in capsys.readouterr().out
    made = [json.loads(line) for line in first.splitlines()]
    assert made
    for row in made:
        assert set(row["chosen"][0]["content"].split()) <= {*tiny.IDS}
        assert [c["total"] for c in row["provenance"]["candidates"]] == [
            round(sum(w * true_score(c, t["caption"]) for w, c in zip((1.1, 1, 1), CRITERIA.values(), strict=True)), 6)
            for t in row["provenance"]["candidates"]
        ]
    assert made[0]["provenance"]["settings"]["captioner"]["model"] == str(model)
    assert check_pairs(out, min_score_gap=2).ok
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert b"sk-not-to-be-seen" not in written
    # The recorded answers serve the same command without a server.
    recorded = tmp_path / "answers.jsonl"
    AnswerCache(out / "judge.sqlite").export(recorded)
    assert cli.main([*words, "--judge_answers", str(recorded), "--judge_url", "http://127.0.0.1:9/v1"]) == 0
    assert (out / "pairs.jsonl").read_bytes() == first


def test_a_config_file_an_oracle_and_a_list_with_a_missing_video(model, tmp_path, caplog):
    videos = make_videos(tmp_path / "videos", 2)
    entries = [{"videoID": name, "enCap": [], "chCap": []} for name in ("video00", "video01", "gone")]
    (tmp_path / "vatex.json").write_text(json.dumps(entries))
    options = {"videos": str(videos), "video_list": str(tmp_path / "vatex.json"), "model": str(model), "judge": ORACLE}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(options | {"out": str(tmp_path / "pairs"), "num_frames": 2}))
    with caplog.at_level(logging.INFO):
        code = cli.main(["pairs", "--config", str(tmp_path / "c.yaml"), *SMALL[2:4], "--min_score_gap", "0.5"])
    assert code == 1  # a video of the list is missing
    assert "1 videos of the list are not in" in caplog.text
    assert len((tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()) == 2
    statistics = json.loads((tmp_path / "pairs" / "report" / "statistics.json").read_text())
    assert statistics["lost"]["not in the folder"] == {"count": 1, "first": ["gone"]}


def test_check(tmp_path, capsys):
    good = {"prompt": "x", "chosen": "a", "rejected": "b", "score_chosen": 5, "score_rejected": 2}
    (tmp_path / "p.jsonl").write_text(json.dumps(good) + "\n")
    assert cli.main(["pairs", "check", str(tmp_path / "p.jsonl")]) == 0
    assert "kept" in capsys.readouterr().out
    assert cli.main(["pairs", "check", str(tmp_path / "p.jsonl"), "--min_score_gap", "4"]) == 1
    assert "score gap" in capsys.readouterr().out
    (tmp_path / "q.jsonl").write_text("{\n")
    assert cli.main(["pairs", "check", str(tmp_path / "p.jsonl"), str(tmp_path / "q.jsonl")]) == 1
    assert "q.jsonl:1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "videos is missing; give --videos"),
        (["chek", "x"], "the only word is `check`"),
        (["check"], "the only word is `check`"),
        (["check", "x", "--seed", "3"], "check takes --min_score_gap only, not --seed"),
        (["check", "none.jsonl"], "none.jsonl"),
        (["--vidoes", "x"], "did you mean '--videos'?"),
        (["--videos", "none", "--model", "m", "--judge", ORACLE, "--out", "o"], "none: no such folder"),
        (["--videos", "V", "--model", "m", "--judge", ORACLE, "--out", "o", "--candidates", "1"], "candidates is 1"),
        (["--videos", "V", "--model", "m", "--judge", ORACLE, "--out", "o", "--weight_fluency", "-1"], "weight of flu"),
        (["--videos", "V", "--model", "m", "--judge", "python:no:x", "--out", "o"], "judge 'no:x': No module"),
        (["--videos", "V", "--model", "m", "--judge", "j", "--out", "o", "--budget", "5"], "a budget needs prices"),
        (["--videos", "V", "--model", "m", "--judge", "j", "--out", "o", "--judge_options", "3"], "a JSON object is"),
        (["--videos", "V", "--model", "m", "--judge", "j", "--out", "o", "--judge_url", "x"], "an address such as"),
        (
            ["--videos", "V", "--model", "m", "--judge", "j", "--out", "o", "--judge_key_file", "none"],
            "key file 'none'",
        ),
        (["--videos", "V", "--model", "m", "--judge", "j", "--out", "o", "--layout", "x"], "layout is 'x'"),
        (
            ["--videos", "V", "--model", "m", "--judge", "j", "--out", "o", "--fps", "1", "--num_frames", "2"],
            "give one",
        ),
    ],
)
def test_wrong_usage_is_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_videos(tmp_path / "V", 1)
    assert cli.main(["pairs", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
