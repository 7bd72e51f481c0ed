"""What a build holds does not grow with the records that pass through it."""

import json
import random
import tracemalloc

from synpo.judge import OracleJudge
from synpo.pairs.captioning import CaptionStore
from synpo.pairs.video_lists import VideoItem, VideoList
from tests.judge.loopback import true_score

from .making import PLAN, FakeCaptioner
from .test_build import build, rows

WORDS = [f"word{number}" for number in range(400)]


def prepare(out, folder, count):
    """Captions of `count` videos as a run leaves them, about 30 kB each; the videos are empty files."""
    store = CaptionStore(out / "captions", {"captioner": dict(FakeCaptioner().settings), "plan": PLAN.settings()})
    rng = random.Random(count)

    def text():
        return " ".join(rng.choices(WORDS, k=80))

    items = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{number:05d}.mp4"
        path.touch()
        items.append(VideoItem(path.name, path))
        clips = [{"start": 10.0 * i, "end": 10.0 * (i + 1), "draft": text(), "caption": text()} for i in range(16)]
        store.put(
            {
                "name": path.name,
                "path": str(path),
                "section": None,
                "bytes": 0,
                "sha256": f"{number:064d}",
                "duration": 160.0,
                "times": [float(i) for i in range(16)],
                "damaged": 0,
                "clips": clips,
                "candidates": [{"seed": i, "draft": text(), "caption": text()} for i in range(8)],
                "images": None,
            }
        )
    return VideoList(items)


def peak(out, folder, count):
    """Most bytes of Python objects during a build of this many videos; the size of a record."""
    videos = prepare(out, folder, count)
    judge = OracleJudge(lambda question: [true_score(question.criterion, text) for text in question.captions])
    tracemalloc.start()
    try:
        build(folder, out, judge, videos=videos)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(rows(out)) > 0.5 * count
    return most, len(json.dumps(json.loads(next((out / "captions").glob("*/*.json")).read_text())))


def test_memory_is_flat(tmp_path):
    small, size = peak(tmp_path / "a", tmp_path / "videos", 100)
    large, _ = peak(tmp_path / "b", tmp_path / "videos", 400)
    assert size > 20_000
    assert (large - small) / 300 < 0.1 * size
