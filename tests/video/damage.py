"""Decodes damaged copies of small films and prints what became of each: python -m tests.video.damage [COUNT [SEED]]

Its own process, so that a crash in FFmpeg or a hang is seen from outside.
"""

import faulthandler
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from synpo.video import Facts, FramePolicy, Video, VideoError, clip_bounds, decode, probe
from tests.video.films import film

FILMS = [
    ("mp4", "libx264", {}),
    ("mp4", "mjpeg", {}),
    ("mp4", "libx265", {"x265-params": "log-level=none"}),
    ("matroska", "libx264", {}),
    ("webm", "libvpx-vp9", {}),
    ("avi", "mpeg4", {"bf": "2"}),
    ("mpegts", "libx264", {}),
    ("flv", "libx264", {}),
    ("h264", "libx264", {}),
    ("nut", "ffv1", {}),
]
KINDS = ("truncated", "few bits", "many bits", "hole", "swapped", "doubled head")


def damaged(data: bytes, kind: str, rng: np.random.Generator) -> bytes:
    out = np.frombuffer(data, np.uint8).copy()
    first, last = np.sort(rng.integers(0, len(out), 2))
    if kind == "truncated":
        return out[: rng.integers(1, len(out))].tobytes()
    if kind.endswith("bits"):
        count = 3 if kind == "few bits" else max(len(out) // 100, 8)
        np.bitwise_xor.at(out, rng.integers(0, len(out), count), 1 << rng.integers(0, 8, count).astype(np.uint8))
    elif kind == "hole":
        out[first : min(last, first + 400)] = 0
    elif kind == "swapped":
        out = np.concatenate([out[last:], out[first:last], out[:first]])
    else:  # a head that promises what follows it twice
        out = np.concatenate([out[: last // 2], out])
    return out.tobytes()


def outcome(read: Callable[..., Facts | Video], data: bytes, **options: Any) -> str:
    """What a call gives; anything but a VideoError that names its source ends the process."""
    try:
        return type(read(data, time_limit=20.0, **options)).__name__
    except VideoError as error:
        if not str(error).startswith(f"video of {len(data)} bytes: "):
            raise
        return "VideoError"


def main(count: int, seed: int) -> None:
    faulthandler.enable()
    rng = np.random.default_rng(seed)
    whole = [film(container, codec, 24, codec_options=options) for container, codec, options in FILMS]
    for number in range(count):
        source, kind = number % len(FILMS), KINDS[number // len(FILMS) % len(KINDS)]
        data = damaged(whole[source], kind, rng)
        about = {"film": "/".join(FILMS[source][:2]), "kind": kind}
        print(json.dumps(about | {"began": number}), flush=True)
        results = [
            outcome(probe, data),
            outcome(decode, data, policy=FramePolicy(num_frames=5), clips=clip_bounds, threads=1 + number % 2),
        ]
        print(json.dumps(about | {"ended": number, "results": results}), flush=True)


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] + ["240", "0"][len(sys.argv) - 1 :])))
