"""Decoding once against decoding for every view: the whole of a film and its 16 clips, 16 frames each.

    python -m bench.video --video bigbuckbunny.mp4

The film is that file's stream, repeated without re-encoding until it lasts --seconds. What it is compared with is the
usual code: for each of the 17 views PyAV decodes the whole film and keeps that view's frames. Both use the same number
of threads and give RGB arrays of full size; they are compared bit for bit before anything is reported. A row is
appended to bench/results/video_<device>.csv.
"""

import argparse
import csv
import datetime
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from synpo.video import FramePolicy, clip_bounds, decode

from .measure import commit, device_name
from .memory import peak_resident_mb, resident_mb

COLUMNS = [
    "date", "commit", "device", "av", "video", "seconds", "frames", "size", "views", "threads", "once_s", "each_s",
    "ratio", "frames_mb", "once_extra_mb",
]  # fmt: skip


def repeated(source: Path, seconds: float, target: Path) -> int:
    """Writes the first video stream of source, end to end, as often as fills `seconds`; the number of frames."""
    with av.open(str(source)) as given, av.open(str(target), "w") as made:
        stream = given.streams.video[0]
        copy = made.add_stream_from_template(stream)
        step = round(1 / (stream.average_rate * stream.time_base))
        written = 0
        while written < seconds * stream.average_rate:
            given.seek(0)
            first = written
            for packet in given.demux(stream):
                if packet.size:
                    packet.pts += first * step
                    packet.dts += first * step
                    packet.stream = copy
                    made.mux(packet)
                    written += 1
    return written


def spread(first: int, end: int, count: int) -> list[int]:
    return [first + (end - 1 - first) * i // (count - 1) for i in range(count)]


def whole_decode(film: Path, wanted: Sequence[int], threads: int) -> np.ndarray:
    """Frames by number, the usual way."""
    keep, found = set(wanted), {}
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.thread_count = "AUTO", threads
        for number, frame in enumerate(container.decode(stream)):
            if number in keep:
                found[number] = frame.to_ndarray(format="rgb24")
    return np.stack([found[number] for number in wanted])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.video", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--video", type=Path, required=True, help="a video of constant rate")
    parser.add_argument("--seconds", type=float, default=180.0, help="the least length of the film (180)")
    parser.add_argument("--frames", type=int, default=16, help="frames of each view (16)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the decoder, for both (2)")
    parser.add_argument("--out", type=Path, help="CSV to append to; default bench/results/video_<device>.csv")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder) / f"film{args.video.suffix}"
        total = repeated(args.video, args.seconds, film)
        whole_decode(film, [0], args.threads)  # the file into the page cache, the libraries into memory

        before = resident_mb()
        began = time.perf_counter()
        video = decode(film, FramePolicy(num_frames=args.frames), clips=clip_bounds, threads=args.threads)
        once = time.perf_counter() - began
        extra = peak_resident_mb() - before

        views = [video.whole, *video.clips]
        rate = total / video.duration
        # a frame belongs to the view in which it begins
        bounds = [[math.ceil(time * rate - 1e-6) for time in (view.start, view.end)] for view in views]
        each = 0.0
        for view, (first, end) in zip(tqdm(views, unit="view", file=sys.stderr), bounds, strict=True):
            began = time.perf_counter()
            frames = whole_decode(film, spread(first, end, args.frames), args.threads)
            each += time.perf_counter() - began
            if not np.array_equal(frames, view.frames):
                print(f"the frames of {view.start:.2f}-{view.end:.2f} s differ; nothing is reported", file=sys.stderr)
                return 1
    distinct = {id(image): image.nbytes for view in views for image in view.images}
    row = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": device_name(),
        "av": version("av"),
        "video": args.video.stem,
        "seconds": f"{video.duration:.2f}",
        "frames": total,
        "size": f"{video.facts.width}x{video.facts.height}",
        "views": len(views),
        "threads": args.threads,
        "once_s": f"{once:.3f}",
        "each_s": f"{each:.3f}",
        "ratio": f"{each / once:.2f}",
        "frames_mb": f"{sum(distinct.values()) / 2**20:.0f}",
        "once_extra_mb": f"{extra:.0f}",
    }
    out = args.out or Path(__file__).parent / "results" / f"video_{device_name()}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    print("\n".join(f"{name:14} {value}" for name, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
