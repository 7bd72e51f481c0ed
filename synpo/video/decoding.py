"""One sequential decode of a video gives the frames of the whole and of all its clips."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import av
import numpy as np

from .images import Images, display_matrix, oriented
from .policy import FramePolicy, choose_times
from .source import MAX_PIXELS, Deadline, Timeline, VideoError, describe, opened, packets, scan

Bounds = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Facts:
    """What a file holds, for provenance and reports.

    width, height: pixels as shown, rotation applied. frames, duration (s): counted from the packets.
    fps: frames / duration. timing: see Timeline; that frames carry wrong times shows only in decode.
    header_duration (s): what the header states, None if nothing; a large difference means a truncated file. cut_off:
    the read error that ended the file early, or "".
    """

    container: str
    codec: str
    width: int
    height: int
    frames: int
    duration: float
    fps: float
    variable_rate: bool
    timing: str
    header_duration: float | None
    cut_off: str


@dataclass(frozen=True)
class View:
    """Frames that stand for the stretch [start, end) of a video, both in seconds.

    times: (F,) float64, seconds at which each frame begins to be shown, rising. All seconds of a Video count from the
    first frame, or from the start of the section that was asked for.
    """

    start: float
    end: float
    times: np.ndarray
    images: tuple[np.ndarray, ...]  # views that show one frame share its array

    @property
    def frames(self) -> np.ndarray:
        """(F, H, W, 3) uint8, RGB; a new array at every access."""
        return np.stack(self.images)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Video:
    """The frames that were chosen of a video: of the whole, and of each of its clips.

    path: the file, or a description of the bytes. duration: seconds of the whole view. damaged: packets that could
    not be decoded and frames that the decoder marks as incomplete, among those that were read.
    """

    path: str
    facts: Facts
    whole: View
    clips: tuple[View, ...]
    damaged: int

    @property
    def duration(self) -> float:
        return self.whole.end - self.whole.start

    @property
    def frames(self) -> np.ndarray:
        """(F, H, W, 3) uint8, RGB, of the whole view; a new array at every access."""
        return self.whole.frames

    @property
    def times(self) -> np.ndarray:
        """(F,) seconds of the whole view's frames."""
        return self.whole.times


def probe(source: str | Path | bytes, *, time_limit: float = 60.0) -> Facts:
    """What a file holds, from its packets and one decoded frame. VideoError as for decode."""
    deadline = Deadline(describe(source), time_limit)
    timeline = scan(source, deadline)
    reader = _Reader(source, timeline, 1, deadline)
    next(reader.frames(timeline.ticks[0]), None)
    if reader.known is None:
        raise VideoError(deadline.name, "none of its frames can be decoded")
    return reader.known


def decode(
    source: str | Path | bytes,
    policy: FramePolicy = FramePolicy(),  # noqa: B008 - frozen
    *,
    clips: Callable[[float], Bounds] | None = None,
    clip_policy: FramePolicy | None = None,
    section: tuple[float, float] | None = None,
    each: Callable[[np.ndarray, int], np.ndarray] | None = None,
    threads: int = 1,
    time_limit: float = 600.0,
    tolerance: float = 0.1,
    max_bytes: int = 2 << 30,
) -> Video:
    """The frames of a video that stand for it as a whole, and for each clip, from one sequential decode.

    The frame of a moment is the one on screen then, by presentation time; FramePolicy says which moments. Rotation
    and mirroring that the file asks for are applied; pixels that are not square stay as they are stored.

    Args:
        source: a file, or a file's content. Never an address, a pipe or a playlist.
        policy: frames of the whole.
        clips: from the duration in seconds to the clips' (start, end); clip_bounds is the paper's. None: no clips.
        clip_policy: frames of each clip; None means policy.
        section: (start, end) in seconds of the file; what lies outside does not exist for this call.
        each: from a chosen frame (H, W, 3) uint8 and the number of frames in its view to what is kept of it, as it is
            decoded: PixelSpec.resize keeps the memory of many or large frames small.
        threads: of the decoder; 0 lets FFmpeg choose. With more than one, what a damaged file gives may differ from
            run to run; of other files the frames do not depend on it.
        time_limit: seconds for this call.
        tolerance: the share of what is read that may be damaged.
        max_bytes: the most that the chosen frames may take.

    Raises:
        VideoError: names the file and the cause: missing, empty, not a video, without a video stream, without a frame
            that can be decoded, shorter than a section or clip, damaged beyond tolerance, over time_limit or
            max_bytes, or with frames that `each` refuses by a ValueError.
        ValueError: arguments out of range.
    """
    deadline = Deadline(describe(source), time_limit)
    timeline = scan(source, deadline)
    start, end = _section(section, timeline, deadline.name)
    stretches = [(start, end, policy)]
    for clip_start, clip_end in clips(end - start) if clips else ():
        if not 0 <= clip_start < clip_end:
            raise ValueError(f"clips: 0 <= start < end must hold, not {(clip_start, clip_end)}")
        if clip_start >= end - start:
            raise VideoError(
                deadline.name, f"clip {(clip_start, clip_end)} begins after its end at {end - start:.3f} s"
            )
        stretches.append((start + clip_start, min(start + clip_end, end), clip_policy or policy))
    moments = [
        choose_times(timeline.ticks, timeline.at(a), timeline.at(b), b - a, policy) for a, b, policy in stretches
    ]
    sizes = [len(chosen) if each else 0 for chosen in moments]  # what `each` does may depend on it
    wanted: dict[int, set[int]] = {}
    for chosen, size in zip(moments, sizes, strict=True):
        for moment in chosen:
            wanted.setdefault(moment, set()).add(size)
    reader = _Reader(source, timeline, threads, deadline)
    try:
        shown = _collect(reader, wanted, Images(each, max_bytes, deadline.name))
    except _BackwardsError:
        reader = _Reader(source, replace(timeline, timing="order"), threads, deadline)
        shown = _collect(reader, wanted, Images(each, max_bytes, deadline.name))
    if reader.damaged > tolerance * reader.read:
        raise VideoError(
            deadline.name, f"{reader.damaged} of {reader.read} frames are damaged, more than tolerance={tolerance:g}"
        )
    views = []
    for (a, b, _), chosen, size in zip(stretches, moments, sizes, strict=True):
        ticks, images = zip(*(shown[moment, size] for moment in chosen), strict=True)
        times = [float((tick - timeline.ticks[0]) * timeline.time_base) - start for tick in ticks]
        views.append(View(a - start, b - start, np.array(times), images))
    assert reader.known is not None  # a frame was collected
    return Video(deadline.name, reader.known, views[0], tuple(views[1:]), reader.damaged)


def _section(section: tuple[float, float] | None, timeline: Timeline, name: str) -> tuple[float, float]:
    if section is None:
        return 0.0, timeline.seconds
    start, end = section
    if not 0 <= start < end:
        raise ValueError(f"section: 0 <= start < end must hold, not {section}")
    if start >= timeline.seconds:
        raise VideoError(name, f"section {section} begins after its end at {timeline.seconds:.3f} s")
    return start, min(end, timeline.seconds)


def _collect(
    reader: "_Reader", wanted: dict[int, set[int]], images: Images
) -> dict[tuple[int, int], tuple[int, np.ndarray]]:
    """(tick, image) of the frame on screen at each wanted moment, for each size of view: wanted is moment -> sizes.

    One frame is held back until its successor is known. The last one stays; so it does where the end cannot be decoded.
    """
    shown: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
    waiting = sorted(wanted, reverse=True)
    held: tuple[int, av.VideoFrame] | None = None

    def settle(before: float) -> None:
        tick, frame = held
        made: dict[int, np.ndarray] = {}
        while waiting and waiting[-1] < before:
            moment = waiting.pop()
            for count in wanted[moment]:
                if count not in made:
                    made[count] = images.of(frame, count)
                shown[moment, count] = tick, made[count]

    for tick, frame in reader.frames(waiting[-1]):
        if held is not None:
            settle(tick)
        held = tick, frame
        if not waiting:
            break
    if held is None:
        raise VideoError(reader.deadline.name, "none of its frames can be decoded")
    settle(math.inf)
    return shown


class _BackwardsError(Exception):
    """A decoder gives frames in the order of presentation, so a time before its predecessor's is wrong."""


class _Reader:
    """Decoded frames of a file in the order of presentation, and what was met on the way.

    read: packets given to the decoder. damaged: those it refused, and frames it marked. known: facts, from the first
    frame on.
    """

    def __init__(self, source: str | Path | bytes, timeline: Timeline, threads: int, deadline: Deadline) -> None:
        if threads < 0:
            raise ValueError(f"threads must be 0 (FFmpeg's choice) or more, not {threads}")
        self.source = source
        self.timeline = timeline
        self.threads = threads
        self.deadline = deadline
        self.read = self.damaged = 0
        self.known: Facts | None = None

    def frames(self, tick: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """(tick, frame) of every frame from the one on screen at `tick` on, and of some before it."""
        first = self.timeline.first_packet(tick)
        count, last = 0, -math.inf
        with opened(self.source, self.deadline) as (container, stream):
            context = stream.codec_context
            context.thread_type = "AUTO"
            context.thread_count = self.threads
            context.options = {"max_pixels": str(MAX_PIXELS)}
            numbered = enumerate(packets(container, stream, self.deadline, []))
            for packet in chain((p for n, p in numbered if n >= first), [None]):
                for frame in self._decoded(context, packet):
                    last = self._tick(frame, count, last)
                    count += 1
                    if self.known is None:
                        self.known = self._facts(container.format.name, context.name, frame)
                    yield last, frame

    def _decoded(self, context: av.VideoCodecContext, packet: av.Packet | None) -> list[av.VideoFrame]:
        self.deadline.check()
        self.read += packet is not None
        try:
            frames = context.decode(packet)
        except av.FFmpegError:
            self.damaged += 1
            return []
        self.damaged += sum(frame.is_corrupt for frame in frames)
        return frames

    def _tick(self, frame: av.VideoFrame, count: int, last: float) -> int:
        ticks = self.timeline.ticks
        if self.timeline.timing != "stamps" or (frame.pts is None and last == -math.inf):
            return ticks[min(count, len(ticks) - 1)]
        if frame.pts is None:
            return int(last)
        if frame.pts < last:
            raise _BackwardsError
        return frame.pts

    def _facts(self, container: str, codec: str, frame: av.VideoFrame) -> Facts:
        upright = oriented(np.empty((frame.height, frame.width, 0), np.uint8), display_matrix(frame))
        timeline, frames = self.timeline, len(self.timeline.ticks)
        return Facts(
            container=container,
            codec=codec,
            width=upright.shape[1],
            height=upright.shape[0],
            frames=frames,
            duration=timeline.seconds,
            fps=frames / timeline.seconds,
            variable_rate=timeline.variable_rate,
            timing=timeline.timing,
            header_duration=timeline.header_seconds,
            cut_off=timeline.cut_off,
        )
