"""A build that is killed at any moment goes on, and ends in the same bytes; only requests under way are paid again."""

import os
import random
import signal
import sys
import time

import pytest

from tests.judge.loopback import judged, serving

from .making import make_videos
from .test_build import build, contents, model_judge

VIDEOS, CONCURRENCY = 4, 4


def start(folder, out, url):
    """A build in a forked process; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        server = type("Server", (), {"url": url})
        signal.alarm(60)
        build(folder, out, model_judge(server, out, concurrency=CONCURRENCY))
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def kill_and_resume(folder, reference, out, server, kills, rng, seconds):
    """Start, kill after a random time, start again ...; after the kills, let it end. Returns (kills that hit, paid)."""
    hits = 0
    while True:
        pid = start(folder, out, server.url)
        if hits < kills:
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            hits += 1
            continue
        assert os.waitstatus_to_exitcode(status) == 0
        break
    assert contents(out) == reference
    return hits, server.count


def slow(body, headers):
    time.sleep(0.002)
    return judged(body, headers)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_kills_at_random_moments(tmp_path):
    kills = int(os.environ.get("SYNPO_TEST_KILLS", "5"))
    folder = make_videos(tmp_path / "videos", VIDEOS)
    rng = random.Random(5)
    with serving(slow, keep=False) as server:
        began = time.monotonic()
        pid = start(folder, tmp_path / "whole", server.url)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        seconds = time.monotonic() - began
        needed = server.count
        reference = contents(tmp_path / "whole")
    hits = paid = rounds = 0
    while hits < kills:
        out = tmp_path / f"killed{rounds}"
        with serving(slow, keep=False) as server:
            # Few kills for each dataset, so that they fall into all stages, the writing of the outputs included.
            found, count = kill_and_resume(folder, reference, out, server, min(5, kills - hits), rng, seconds)
        assert needed <= count <= needed + found * CONCURRENCY
        hits, paid, rounds = hits + found, paid + count - needed, rounds + 1
    print(f"{hits} kills over {rounds} datasets of {needed} requests: {paid} requests paid again")
