"""python -m bench.video: both ways give the same frames, and a row says how long each took."""

import csv

from bench import video
from tests.video.films import film


def test_a_row_of_the_comparison(tmp_path, capsys):
    (tmp_path / "short.mp4").write_bytes(film(frames=20))
    out = tmp_path / "rows.csv"
    arguments = ["--video", str(tmp_path / "short.mp4"), "--seconds", "21", "--frames", "3", "--threads", "1"]
    for _ in range(2):
        assert video.main([*arguments, "--out", str(out)]) == 0
    first, second = csv.DictReader(out.read_text().splitlines())
    assert first.keys() == second.keys() == set(video.COLUMNS)
    assert (first["frames"], first["views"], first["seconds"]) == ("220", "4", "22.00")
    assert float(first["ratio"]) > 0
    assert "ratio" in capsys.readouterr().out


def test_frames_that_differ_are_not_reported(tmp_path, monkeypatch, capsys):
    (tmp_path / "short.mp4").write_bytes(film(frames=20))
    monkeypatch.setattr(video, "spread", lambda first, end, count: [first] * count)
    out = tmp_path / "rows.csv"
    assert video.main(["--video", str(tmp_path / "short.mp4"), "--seconds", "2", "--out", str(out)]) == 1
    assert not out.exists()
    assert "differ; nothing is reported" in capsys.readouterr().err
