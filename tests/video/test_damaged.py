"""Hundreds of damaged files: each is decoded or refused by name; none crashes, hangs or raises anything else."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

COUNT = 240


def test_damaged_files_neither_crash_nor_hang():
    command = [sys.executable, "-m", "tests.video.damage", str(COUNT)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=root)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (lines[-1:], done.stderr[-3000:])
    ended = [line for line in lines if "ended" in line]
    assert len(ended) == COUNT
    found = Counter(result for line in ended for result in line["results"])
    assert set(found) == {"Facts", "Video", "VideoError"}
    # both outcomes are common, or the damage would be too small or too large to test anything
    assert found["Video"] > COUNT / 5
    assert found["VideoError"] > COUNT / 5
