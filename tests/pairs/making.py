"""Small videos, and a captioner whose texts are made of what it is shown and its seed."""

import hashlib
from pathlib import Path

import av
import numpy as np

from synpo.pairs.captioning import CaptionPlan, Written
from synpo.video import FramePolicy

PLAN = CaptionPlan(frames=FramePolicy(num_frames=2))


def make_video(path: Path, number: int, frames: int = 12) -> Path:
    """A second of a gradient that moves; another number is another video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        ramp = np.arange(48, dtype=np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2)
        for index in range(frames):
            image = ramp * 2 + np.uint8((number * 7 + index * 5) % 256)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def make_videos(folder: Path, count: int) -> Path:
    for number in range(count):
        make_video(folder / f"video{number:02d}.mp4", number)
    return folder


class FakeCaptioner:
    """Counts its calls; `fails` says which (instruction, seed) it has no text for."""

    parallel = 2
    shrink = None

    def __init__(self, fails=lambda instruction, seed: False, model="fake"):
        self.settings = {"model": model}
        self.fails, self.calls = fails, 0

    def __call__(self, views, instruction, seeds):
        self.calls += 1
        each = [[None]] * len(views) if seeds is None else seeds
        return [
            [self._write(view, instruction, seed) for seed in own] for view, own in zip(views, each, strict=True)
        ]

    def close(self):
        pass

    def _write(self, view, instruction, seed):
        if self.fails(instruction, seed):
            return Written(None, None)
        seen = hashlib.sha256(b"".join(image.tobytes() for image in view.images))
        seen.update(f"{instruction}{seed}".encode())
        draft = f"A ramp {seen.hexdigest()[:8]} moves" + " slowly" * (seen.digest()[0] % 9)
        return Written(draft, f"{draft}, seen again.")
