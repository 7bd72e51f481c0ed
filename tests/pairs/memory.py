"""`python -m tests.pairs.memory [VIDEOS]`: resident memory of a build whose captions are there already."""

import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from synpo.judge import OracleJudge
from tests.judge.loopback import true_score

from .test_build import build, rows
from .test_memory import prepare


def main(count: int = 5000) -> None:
    asked: set[int] = set()
    samples: list[tuple[int, float]] = []  # videos whose captions have been judged, MB
    done = threading.Event()

    def judge(question):
        if question.references:  # the clip captions of a video
            asked.add(hash(tuple(question.references)))
        return [true_score(question.criterion, text) for text in question.captions]

    def sample():
        while not done.wait(0.1):
            samples.append((len(asked), psutil.Process().memory_info().rss / 2**20))

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        videos = prepare(root / "out", root / "videos", count)
        watch = threading.Thread(target=sample)
        watch.start()
        began = time.perf_counter()
        build(root / "videos", root / "out", OracleJudge(judge), videos=videos)
        done.set()
        watch.join()
        print(f"{count} videos, {len(rows(root / 'out'))} pairs, {time.perf_counter() - began:.1f} s")
    for share in (0.02, 0.1, 0.5, 0.9):
        most = max(rss for judged, rss in samples if judged <= share * count)
        print(f"up to {int(share * count)} videos: {most:.0f} MB")
    print(f"to the end, outputs written: {max(rss for _, rss in samples):.0f} MB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
