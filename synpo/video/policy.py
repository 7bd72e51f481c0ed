"""Which frames: how many of a stretch of video, which clips a video falls into, which frames the contrast view keeps.

Everything here is arithmetic on times; nothing opens a file.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

CLIP_SECONDS = 10.0
MIN_CLIPS, MAX_CLIPS = 2, 16


@dataclass(frozen=True)
class FramePolicy:
    """How many frames represent a stretch of video; they lie evenly in time, its first and last frame among them.

    With num_frames it is that number. Otherwise it is duration * fps, at least min_frames and at most max_frames;
    without fps either, max_frames. A stretch with fewer frames gives each of them once.
    The release of SynPO uses FramePolicy(fps=0.5).

    Raises:
        ValueError: numbers out of range, or both num_frames and fps.
    """

    num_frames: int | None = None
    fps: float | None = None
    min_frames: int = 8
    max_frames: int = 16

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.fps is not None:
            raise ValueError(f"num_frames={self.num_frames} and fps={self.fps}: give one of them")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, not {self.num_frames}")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps must be positive, not {self.fps}")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(f"1 <= min_frames <= max_frames must hold, not {self.min_frames} and {self.max_frames}")

    def count(self, duration: float) -> int:
        """Frames for a stretch of `duration` seconds that has enough of them."""
        if self.num_frames is not None:
            return self.num_frames
        if self.fps is None:
            return self.max_frames
        return min(max(int(duration * self.fps), self.min_frames), self.max_frames)


def clip_bounds(duration: float) -> list[tuple[float, float]]:
    """The (start, end) of a video's clips in seconds: clamp(duration // 10 s + 1, 2, 16) of equal length.

    The rule of the SynPO paper (arXiv 2506.00835). ValueError for a duration that is not positive.
    """
    if not duration > 0:
        raise ValueError(f"duration must be positive, not {duration}")
    count = min(max(int(duration // CLIP_SECONDS) + 1, MIN_CLIPS), MAX_CLIPS)
    edges = [duration * i / count for i in range(count)] + [duration]
    return list(pairwise(edges))


def spread(count: int, chosen: int) -> np.ndarray:
    """`chosen` of the indices 0..count-1, evenly spaced with both ends, (chosen,) int64; a single one is the middle."""
    if chosen == 1:
        return np.array([count // 2])
    return np.arange(chosen) * (count - 1) // (chosen - 1)


def contrast_subset(count: int, share: float = 1 / 3) -> np.ndarray:
    """Indices of the frames that contrastive decoding's poorer view keeps: round(count * share) of `count`, at least
    one, evenly spaced, (C,) int64 in rising order.

    ValueError when there is nothing to choose from or share is outside (0, 1].
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], not {share}")
    return spread(count, max(1, round(count * share)))


def choose_times(ticks: Sequence[int], start: float, end: float, seconds: float, policy: FramePolicy) -> list[int]:
    """The moments whose frames represent the stretch [start, end): in ticks, rising, one for each chosen frame.

    `ticks` are the presentation times of all frames, rising; start and end are in ticks, `seconds` is what they span.
    The frame of a moment is the one on screen then: the last that begins at or before it. The moments run evenly from
    the first frame that begins within the stretch to the last one. So with a constant rate they are evenly spaced
    frames, and with a variable rate a frame that is held long counts several times. A stretch in which no frame
    begins has one moment, its start.
    """
    first, last = bisect_left(ticks, start), bisect_left(ticks, end) - 1
    if first > last:
        return [int(start)]
    chosen = min(policy.count(seconds), last - first + 1)
    if chosen == 1:
        return [(ticks[first] + ticks[last]) // 2]
    return [ticks[first] + (ticks[last] - ticks[first]) * i // (chosen - 1) for i in range(chosen)]
