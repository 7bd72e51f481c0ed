"""Opening a video file and reading its packets: what it holds and when each frame is shown, without decoding it.

Headers lie: a truncated file still states its full duration, a copied stream the frame count of the original, a live
recording nothing at all. So the packets are counted, and their time stamps are the timeline.
"""

import io
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

# Containers and raw streams of video. Playlists (hls, dash, concat) are not among them: they make the reader open
# other files and addresses, and videos come from strangers.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,h263,h264,hevc,vvc,av1,obu,ivf,"
    "mjpeg,gif,apng,yuv4mpegpipe,nut,mxf,rm,dv,wtv,dhav"
)
MAX_PIXELS = 8192 * 4320  # of one frame: an 8K film; a corrupt header may ask for gigabytes
MAX_REORDER_SECONDS = 10.0  # between decoding and showing a frame; more is a damaged time stamp
FALLBACK_RATE = 25


class VideoError(ValueError):
    """A video that cannot be used. `name` is the file, `cause` says why."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(name, cause)
        self.name = name
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.name}: {self.cause}"


class Deadline:
    """A time limit on the work with one file, so that a damaged one cannot stall a run."""

    def __init__(self, name: str, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"time_limit must be positive, not {seconds}")
        self.name = name
        self.seconds = seconds
        self.end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise VideoError(self.name, f"not done after time_limit={self.seconds:g} s")


@dataclass(frozen=True)
class Timeline:
    """When the frames of a file are shown.

    ticks: presentation times in units of time_base, rising, one for each packet of video.
    frame_ticks: how long the last frame stays.
    timing: "stamps": a frame is shown at the time that it carries. "order": the times are right, the frames carry wrong
    ones (AVI stores none, and FFmpeg's guess ignores reordering), so the k-th decoded frame has the k-th tick. "count":
    the same, with ticks that count frames, since time stamps are missing or go back.
    keyframes: (tick, number of the packet) of each frame from which decoding can start.
    header_seconds: the duration that the header states, None where it does not; only for comparison.
    cut_off: why reading ended before the end of the file, or "".
    """

    ticks: tuple[int, ...]
    time_base: Fraction
    frame_ticks: int
    timing: str
    keyframes: tuple[tuple[int, int], ...]
    header_seconds: float | None
    cut_off: str

    @property
    def seconds(self) -> float:
        """From the beginning of the first frame to the end of the last one."""
        return float((self.ticks[-1] + self.frame_ticks - self.ticks[0]) * self.time_base)

    @property
    def variable_rate(self) -> bool:
        """Whether the steps between frames differ by more than the rounding of stamps to ticks, or to a millisecond."""
        steps = [b - a for a, b in pairwise(self.ticks)]
        rounding = max(2, 2 * Fraction(1, 1000) / self.time_base)
        return bool(steps) and max(steps) - min(steps) > rounding

    def at(self, seconds: float) -> int:
        """The first tick at or after a time, counted from the first frame."""
        ticks = Fraction(seconds).limit_denominator(10**9) / self.time_base
        return self.ticks[0] + -int(-ticks // 1)

    def first_packet(self, tick: int) -> int:
        """The packet at which to start in order to get the frame on screen at `tick`.

        That is one keyframe more than needed, since a stream with gradual refresh is whole only a while after one.
        """
        if self.timing != "stamps":
            return 0
        before = bisect_right(self.keyframes, tick, key=lambda keyframe: keyframe[0])
        return self.keyframes[before - 2][1] if before >= 2 else 0


def describe(source: str | Path | bytes) -> str:
    """How errors name a source."""
    return f"video of {len(source)} bytes" if isinstance(source, bytes) else str(source)


@contextmanager
def opened(source: str | Path | bytes, deadline: Deadline) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream; what FFmpeg raises inside becomes a VideoError."""
    name = deadline.name
    if isinstance(source, bytes):
        file, empty = io.BytesIO(source), not source
    else:
        path = Path(source)
        if not path.is_file():  # a pipe or a device would never end
            raise VideoError(name, "is not a regular file" if path.exists() else "does not exist")
        file, empty = str(path.absolute()), not path.stat().st_size
    if empty:
        raise VideoError(name, "is empty")
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    try:
        with av.open(file, container_options=options, metadata_errors="replace", timeout=deadline.seconds) as container:
            yield container, _video_stream(container, name)
    except av.FFmpegError as error:
        raise VideoError(name, f"cannot be read as a video ({error.strerror or error})") from error


def _video_stream(container: InputContainer, name: str) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams})
        raise VideoError(name, f"has no video stream, only {', '.join(kinds)}" if kinds else "has no stream at all")
    stream = streams[0]
    if stream.codec_context is None:
        raise VideoError(name, "has a video stream in a codec that this FFmpeg does not know")
    if stream.width * stream.height > MAX_PIXELS:
        raise VideoError(name, f"has frames of {stream.width}x{stream.height}; {MAX_PIXELS} pixels are the limit")
    return stream


def packets(container: InputContainer, stream: VideoStream, deadline: Deadline, cut_off: list[str]) -> Iterator[Packet]:
    """The stream's packets in decoding order. A read error ends them and is appended to cut_off."""
    try:
        for packet in container.demux(stream):
            deadline.check()
            if packet.size and not packet.is_discard:  # a decoder takes an empty one as the end of the stream
                yield packet
    except av.FFmpegError as error:
        cut_off.append(error.strerror or str(error))


def scan(source: str | Path | bytes, deadline: Deadline) -> Timeline:
    """The timeline of a file. VideoError where it cannot be opened or holds no frame."""
    cut_off: list[str] = []
    with opened(source, deadline) as (container, stream):
        found = [(p.pts, p.dts, p.duration or 0, p.is_keyframe) for p in packets(container, stream, deadline, cut_off)]
        rate = stream.guessed_rate or stream.average_rate
        time_base = stream.time_base
        header = stream.duration * time_base if stream.duration and time_base else None
        if header is None and container.duration:
            header = Fraction(container.duration, av.time_base)
    if not found:
        raise VideoError(deadline.name, f"has no frame of video{f' ({cut_off[0]})' if cut_off else ''}")
    return _timeline(found, time_base, rate, None if header is None else float(header), "".join(cut_off))


def _timeline(
    found: list[tuple[int | None, int | None, int, bool]],
    time_base: Fraction | None,
    rate: Fraction | None,
    header: float | None,
    cut_off: str,
) -> Timeline:
    rate = rate if rate and rate <= 1000 else Fraction(FALLBACK_RATE)
    decoded = [dts for _, dts, _, _ in found if dts is not None]
    shown = [pts for pts, _, _, _ in found if pts is not None]
    rises = all(a <= b for a, b in pairwise(decoded))
    ticks, timing = sorted(shown), "stamps"
    if len(shown) < len(found) and len(decoded) == len(found):
        ticks, timing = decoded, "order"
    if not time_base or len(ticks) < len(found) or not rises or not _plausible(found, time_base):
        timing = "count"
    if timing == "count" or (len(ticks) > 1 and ticks[0] == ticks[-1]):
        ticks, timing, time_base = list(range(len(found))), "count", 1 / rate
    step = (ticks[-1] - ticks[0]) // (len(ticks) - 1) if len(ticks) > 1 else round(1 / (rate * time_base))
    stay = max((d for pts, _, d, _ in found if pts == ticks[-1]), default=0) if timing == "stamps" else 0
    keyframes = sorted((pts, number) for number, (pts, _, _, key) in enumerate(found) if key and pts is not None)
    return Timeline(tuple(ticks), time_base, max(stay or step, 1), timing, tuple(keyframes), header, cut_off)


def _plausible(found: list[tuple[int | None, int | None, int, bool]], time_base: Fraction) -> bool:
    """Whether no frame waits longer between decoding and showing than reordering explains."""
    most = MAX_REORDER_SECONDS / time_base
    return all(abs(pts - dts) <= most for pts, dts, _, _ in found if pts is not None and dts is not None)
