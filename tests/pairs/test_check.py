"""check_pairs goes on after bad records and counts everything."""

import json

import pytest
from PIL import Image

from synpo.pairs import check_pairs
from tests.video import films


def write(path, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_every_problem_is_found_in_one_pass(tmp_path):
    (tmp_path / "there.mp4").write_bytes(films.film(frames=3))
    base = {"prompt": "Who?", "chosen": "Ann is.", "rejected": "Bob.", "score_chosen": 9, "score_rejected": 3}
    file = write(
        tmp_path / "p.jsonl",
        base | {"videos": ["there.mp4", "gone.mp4", "https://x/far.mp4"]},
        '{"prompt": ',
        base | {"prompt": "When?", "rejected": "Yesterday.", "videos": [["f1.png"]]},
        {"prompt": "Why?", "chosen": "So."},
        base | {"prompt": [{"role": "user", "content": "Who?"}]},
        base | {"prompt": "Where?", "chosen": " "},
        base | {"prompt": "How?", "score_chosen": None},
    )
    report = check_pairs(file, media_dir=tmp_path, min_score_gap=4)
    assert not report.ok
    assert report.error_count == 3
    assert [error.split(": ")[0] for error in report.errors] == [f"{file}:{line}" for line in (2, 4, 5)]
    assert report.filters.dropped == {
        "empty": 1, "same answers": 0, "score missing": 1, "score gap": 0, "duplicate": 0
    }  # fmt: skip
    assert (report.filters.total, report.filters.kept) == (4, 2)
    assert report.missing_media == [f"{file}:1: {tmp_path / 'gone.mp4'}", f"{file}:3: {tmp_path / 'f1.png'}"]
    assert report.media == {"videos": 4}
    assert (report.with_scores, report.mean_score_gap, report.chosen_longer) == (2, 6.0, 0.5)
    assert report.median_length == {"prompt": 4.5, "chosen": 7, "rejected": 7}
    printed = str(report)
    assert printed.endswith("not ok")
    for words in ("records that cannot be used: 3", "media files that are not there: 2", "p.jsonl:4", "kept"):
        assert words in printed


def test_media_that_cannot_be_read_are_found_before_training(tmp_path):
    film = films.film(frames=6)
    (tmp_path / "whole.mp4").write_bytes(film)
    (tmp_path / "cut.mp4").write_bytes(film[: len(film) // 2])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.png").write_text("not an image")
    Image.new("RGB", (8, 8)).save(tmp_path / "whole.png")
    base = {"chosen": "a", "rejected": "b"}
    file = write(
        tmp_path / "p.jsonl",
        base | {"prompt": "1", "videos": ["whole.mp4"]},
        base | {"prompt": "2", "videos": ["cut.mp4"]},
        base | {"prompt": "3", "videos": ["empty.mp4"]},
        base | {"prompt": "4", "videos": [["whole.png", "text.png"]]},
        base | {"prompt": "5", "videos": ["cut.mp4"]},
    )
    report = check_pairs(file, media_dir=tmp_path, max_errors=3)
    assert (report.error_count, report.missing_media_count, report.unreadable_media_count) == (0, 0, 4)
    places = [
        f"{file}:{line}: {tmp_path / name}: " for line, name in ((2, "cut.mp4"), (3, "empty.mp4"), (4, "text.png"))
    ]
    for message, place in zip(report.unreadable_media, places, strict=True):
        assert message.startswith(place)
    assert not report.ok
    assert "media that cannot be read: 4" in str(report)


def test_messages_are_bounded_and_counts_are_not(tmp_path):
    file = write(tmp_path / "p.jsonl", {"prompt": "x", "chosen": "a", "rejected": "b"}, *["{"] * 5)
    report = check_pairs(file, max_errors=2)
    assert (report.error_count, len(report.errors)) == (5, 2)
    assert "... and 3 more" in str(report)


def test_a_good_file_is_ok_and_a_file_without_pairs_is_not(tmp_path):
    good = check_pairs(write(tmp_path / "p.jsonl", {"prompt": "x", "chosen": "a", "rejected": "b"}))
    assert good.ok
    assert str(good).splitlines()[-1] == "ok"
    assert not check_pairs(write(tmp_path / "q.jsonl", "")).ok
    with pytest.raises(FileNotFoundError):
        check_pairs(tmp_path / "none.jsonl")
